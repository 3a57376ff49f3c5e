"""What an actor call comes to: a value, an error of ours as itself, or what of the cluster was lost."""

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, RayTaskError

from rlsys.control.ports import MakerLost, PayloadLost, WorkerLost
from rlsys.control.remote import call
from rlsys.errors import RewardError
from tests.fakes import run


async def raising(error: Exception) -> None:
    raise error


def failed_task(cause: Exception) -> Exception:
    """As Ray raises what a task raised."""
    return RayTaskError("update", "Traceback ...", cause).as_instanceof_cause()


LOST = ObjectLostError("00" * 28, "10.0.0.1:1", "here")


@pytest.mark.parametrize(
    ("raised", "arrives"),
    [
        (failed_task(RewardError("no")), RewardError),
        (failed_task(KeyError("a bug")), KeyError),
        (ActorDiedError(), WorkerLost),
        (ActorUnavailableError("gone for a while", None), WorkerLost),
        (failed_task(ActorDiedError()), MakerLost),
        (failed_task(ActorUnavailableError("gone for a while", None)), MakerLost),
        (failed_task(LOST), PayloadLost),
        (LOST, PayloadLost),
    ],
)
def test_an_error_arrives_as_what_it_means(raised: Exception, arrives: type[Exception]) -> None:
    with pytest.raises(arrives):
        run(call(raising(raised)))
