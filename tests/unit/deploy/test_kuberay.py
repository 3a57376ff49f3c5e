"""The Kubernetes manifests pass what the API server and the operator check, and keep what the docs promise."""

import copy
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from rlsys.config import load_config
from rlsys.observability.run_directory import RunDirectory

ROOT = Path(__file__).parents[3]
DIRECTORY = ROOT / "deploy" / "kuberay"
CRDS = os.environ.get("KUBERAY_CRDS")
"""Where KubeRay's CustomResourceDefinitions are, which are not ours to ship: only what reads them skips without."""

Manifest = dict[str, Any]
MANIFESTS: dict[str, Manifest] = {
    path.stem: document
    for path in sorted(DIRECTORY.glob("ray*.yaml"))
    for document in [yaml.safe_load(path.read_text())]
}


def cluster_spec(manifest: Manifest) -> dict[str, Any]:
    """The cluster of a RayCluster or of a RayJob that brings one; empty for a job on another's."""
    spec: dict[str, Any] = manifest["spec"]
    return spec if manifest["kind"] == "RayCluster" else spec.get("rayClusterSpec", {})


def groups(cluster: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Head and worker groups by name."""
    if cluster:
        yield "head", cluster["headGroupSpec"]
    for group in cluster.get("workerGroupSpecs", []):
        yield group["groupName"], group


def containers(manifest: Manifest) -> Iterator[dict[str, Any]]:
    for _, group in groups(cluster_spec(manifest)):
        yield from group["template"]["spec"]["containers"]


# What the controller refuses


def refusals(manifest: Manifest) -> list[str]:
    """What KubeRay's controller refuses of a manifest that its schema allows. One line each."""
    return [
        *_cluster_refusals(cluster_spec(manifest)),
        *(_job_refusals(manifest) if manifest["kind"] == "RayJob" else ()),
    ]


def _cluster_refusals(cluster: dict[str, Any]) -> Iterator[str]:
    version = tuple(map(int, re.findall(r"\d+", cluster.get("rayVersion", "0"))))
    if cluster.get("authOptions", {}).get("mode") == "token" and version < (2, 52):
        yield "token authentication needs rayVersion 2.52 or later"
    v2 = cluster.get("enableInTreeAutoscaling") and cluster.get("autoscalerOptions", {}).get("version") == "v2"
    names = [name for name, _ in groups(cluster)]
    if len(names) != len(set(names)):
        yield "two groups have the same name"
    for name, group in groups(cluster):
        if v2 and group["template"]["spec"].get("restartPolicy") != "Never":
            yield f"{name}: autoscaler v2 needs restartPolicy Never"
        both = {"num-cpus", "num-gpus", "memory", "resources"} & set(group.get("rayStartParams", {}))
        if group.get("resources") and both:
            yield f"{name}: resources and rayStartParams.{min(both)} both say what it offers"
        if name != "head" and not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            yield f"{name}: replicas must lie between minReplicas and maxReplicas"
    if cluster.get("gcsFaultToleranceOptions"):
        for name, group in groups(cluster):
            if "redis-password" in group.get("rayStartParams", {}):
                yield f"{name}: gcsFaultToleranceOptions and rayStartParams.redis-password exclude each other"


def _job_refusals(manifest: Manifest) -> Iterator[str]:
    spec = manifest["spec"]
    mode, shut_down = spec.get("submissionMode", "K8sJobMode"), spec.get("shutdownAfterJobFinishes", False)
    if spec.get("suspend") and not shut_down:
        yield "suspend needs shutdownAfterJobFinishes"
    if spec.get("ttlSecondsAfterFinished") and not shut_down:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if spec.get("backoffLimit") and mode == "InteractiveMode":
        yield "backoffLimit does not go with InteractiveMode"
    if spec.get("backoffLimit") and spec.get("clusterSelector"):
        yield "backoffLimit does not go with clusterSelector"
    if spec.get("suspend") and spec.get("clusterSelector"):
        yield "suspend does not go with clusterSelector"
    if not spec.get("clusterSelector") and not spec.get("rayClusterSpec"):
        yield "neither rayClusterSpec nor clusterSelector says where it runs"
    if mode == "SidecarMode":
        head = cluster_spec(manifest)["headGroupSpec"]["template"]["spec"]
        if head.get("restartPolicy") != "Never":
            yield "SidecarMode needs restartPolicy Never on the head"
    if len(manifest["metadata"]["name"]) > 47:
        yield "the name is longer than 47 characters"


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_controller_accepts_the_manifests(name: str) -> None:
    assert refusals(MANIFESTS[name]) == []


def _set(path: str, value: Any) -> Callable[[Manifest], None]:
    def change(manifest: Manifest) -> None:
        *parents, last = path.split(".")
        place: Any = manifest
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place[part]
        place[last] = value

    return change


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("raycluster", {"spec.rayVersion": "2.51.1"}, "token authentication"),
        ("raycluster", {"spec.headGroupSpec.template.spec.restartPolicy": "Always"}, "head: autoscaler v2"),
        ("raycluster", {"spec.workerGroupSpecs.1.template.spec.restartPolicy": None}, "learner: autoscaler v2"),
        ("raycluster", {"spec.workerGroupSpecs.0.rayStartParams.resources": '{"rollout": 1}'}, "rollout: resources"),
        ("raycluster", {"spec.workerGroupSpecs.2.rayStartParams.num-cpus": "4"}, "reward: resources"),
        ("raycluster", {"spec.workerGroupSpecs.2.groupName": "learner"}, "the same name"),
        ("raycluster", {"spec.workerGroupSpecs.0.minReplicas": 2}, "rollout: replicas"),
        ("raycluster", {"spec.headGroupSpec.rayStartParams.redis-password": "x"}, "exclude each other"),
        (
            "rayjob",
            {"spec.suspend": True, "spec.shutdownAfterJobFinishes": False, "spec.ttlSecondsAfterFinished": 0},
            "suspend needs",
        ),
        ("rayjob", {"spec.shutdownAfterJobFinishes": False}, "ttlSecondsAfterFinished needs"),
        ("rayjob", {"spec.submissionMode": "InteractiveMode"}, "InteractiveMode"),
        (
            "rayjob",
            {"spec.clusterSelector": {"ray.io/cluster": "rlsys"}},
            "backoffLimit does not go with clusterSelector",
        ),
        ("rayjob-kueue", {"spec.backoffLimit": 0, "spec.clusterSelector": {"a": "b"}}, "suspend does not go with"),
        (
            "rayjob-kueue",
            {
                "spec.submissionMode": "SidecarMode",
                "spec.rayClusterSpec.headGroupSpec.template.spec.restartPolicy": "Always",
            },
            "SidecarMode needs",
        ),
        ("rayjob", {"spec.rayClusterSpec": {}}, "neither"),
        ("rayjob", {"metadata.name": "x" * 48}, "longer than 47"),
    ],
)
def test_what_the_controller_refuses_is_found(name: str, changes: dict[str, Any], said: str) -> None:
    manifest = copy.deepcopy(MANIFESTS[name])
    for path, value in changes.items():
        _set(path, value)(manifest)
    (problem,) = refusals(manifest)
    assert said in problem


# What the API server refuses


def strict(schema: Any) -> Any:
    """A structural schema as JSON schema, in which an unknown field is an error: the API server drops it silently."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        found.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields", False)))
    return found


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    """By kind."""
    if CRDS is None:
        pytest.skip("set KUBERAY_CRDS to KubeRay's helm-chart/kuberay-operator/crds to check against its schemas")
    found = {}
    for kind, file in (("RayCluster", "ray.io_rayclusters.yaml"), ("RayJob", "ray.io_rayjobs.yaml")):
        crd = yaml.load(Path(CRDS, file).read_text(), yaml.CSafeLoader)
        (version,) = (v for v in crd["spec"]["versions"] if v["name"] == "v1")
        found[kind] = strict(version["schema"]["openAPIV3Schema"])
    return found


def schema_problems(manifest: Manifest, schemas: dict[str, Any]) -> list[str]:
    validator = jsonschema.Draft202012Validator(schemas[manifest["kind"]])
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_manifests_pass_the_schemas_with_no_field_unknown(name: str, schemas: dict[str, Any]) -> None:
    assert MANIFESTS[name]["apiVersion"] == "ray.io/v1"
    assert schema_problems(MANIFESTS[name], schemas) == []


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("spec.authOptions.mode", "tokens", "is not one of"),
        ("spec.autoscalerOptions.version", "v3", "is not one of"),
        ("spec.workerGroupSpecs.0.resources", {"rollout": 1}, "is not of type 'string'"),
        ("spec.workerGroupSpecs.0.replica", 1, "'replica' was unexpected"),
        (
            "spec.headGroupSpec.template.spec.volumes.0.persistentVolumeClaim",
            {"claim": "x"},
            "'claimName' is a required property",
        ),
    ],
)
def test_a_manifest_with_a_mistake_does_not_pass_the_schema(
    path: str, value: Any, said: str, schemas: dict[str, Any]
) -> None:
    manifest = copy.deepcopy(MANIFESTS["raycluster"])
    _set(path, value)(manifest)
    assert any(said in problem for problem in schema_problems(manifest, schemas))


# What the docs promise


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_role_has_a_group_that_offers_it(name: str) -> None:
    cluster = cluster_spec(MANIFESTS[name])
    found = dict(groups(cluster))
    assert list(found) == ["head", "rollout", "learner", "reward"]
    for role in ("rollout", "learner", "reward"):
        assert set(found[role]["resources"]) == {role}
    learner = found["learner"]
    assert learner["minReplicas"] == learner["replicas"] == learner["maxReplicas"]
    for role, group in found.items():
        (container,) = group["template"]["spec"]["containers"]
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (role in ("rollout", "learner"))
    autoscaled = bool(cluster.get("enableInTreeAutoscaling"))
    assert autoscaled == (found["rollout"]["minReplicas"] < found["rollout"]["maxReplicas"])


@pytest.mark.parametrize("name", MANIFESTS)
def test_clusters_ask_for_a_token_and_survive_their_head(name: str) -> None:
    cluster = cluster_spec(MANIFESTS[name])
    assert cluster["authOptions"] == {"mode": "token"}
    password = cluster["gcsFaultToleranceOptions"]["redisPassword"]
    assert set(password["valueFrom"]) == {"secretKeyRef"}


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_are_confined_scrapable_and_mount_what_they_name(name: str) -> None:
    for role, group in groups(cluster_spec(MANIFESTS[name])):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True, role
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes
            assert {"containerPort": 8080, "name": "metrics"} in container["ports"]
            assert container["resources"]["limits"] == container["resources"]["requests"]


def test_the_manifests_differ_only_where_they_say_so() -> None:
    cluster, job, queued = (copy.deepcopy(cluster_spec(MANIFESTS[n])) for n in ("raycluster", "rayjob", "rayjob-kueue"))
    assert job == cluster
    assert "kueue.x-k8s.io/queue-name" in MANIFESTS["rayjob-kueue"]["metadata"]["labels"]
    assert MANIFESTS["rayjob-kueue"]["spec"]["suspend"] is True
    del cluster["enableInTreeAutoscaling"], cluster["autoscalerOptions"]
    for spec in (cluster, queued):
        for group in spec["workerGroupSpecs"]:
            for field in ("replicas", "minReplicas", "maxReplicas"):
                del group[field]
    assert queued == cluster


def test_versions_are_the_ones_that_are_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (ray,) = (d for d in project["dependencies"] if d.startswith("ray["))
    images = {container["image"] for manifest in MANIFESTS.values() for container in containers(manifest)}
    assert images == {f"registry.example.com/rlsys:{project['version']}-gpu"}
    for manifest in MANIFESTS.values():
        assert ray.endswith(f"=={cluster_spec(manifest)['rayVersion']}")


@pytest.mark.parametrize("name", ["rayjob", "rayjob-kueue"])
def test_the_entrypoint_is_a_run_that_fits_the_groups(name: str) -> None:
    spec = MANIFESTS[name]["spec"]
    command, resume = spec["entrypoint"].split(" $(")
    path, *overrides = command.removeprefix("bash -c 'cd /rlsys && exec rlsys train ").split()
    config = load_config(ROOT / path, overrides)
    assert str(RunDirectory(config.path).metrics) in resume
    assert config.resources.address == "auto"
    assert config.resources.roles
    found = dict(groups(spec["rayClusterSpec"]))
    assert found["rollout"]["minReplicas"] <= config.rollout.workers
    assert config.scaling.rollout_max == found["rollout"]["maxReplicas"]
    assert config.reward.workers <= int(found["reward"]["resources"]["reward"])
    gpus = int(found["learner"]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert config.resources.learner_gpus + 2 * config.resources.reference_gpus <= gpus
    mounts = found["head"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert str(config.run_dir) in {mount["mountPath"] for mount in mounts}


@pytest.mark.parametrize("name", ["rayjob", "rayjob-kueue"])
def test_the_entrypoint_reaches_the_head_whole_and_resumes_what_is_there(name: str, tmp_path: Path) -> None:
    """KubeRay's shell hands its words to `ray job submit`, which joins them for a shell on the head."""
    for path in ("rlsys", "runs/cluster", "bin"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "bin" / "rlsys").write_text('#!/bin/sh\necho "in $PWD: $@"\n')
    (tmp_path / "bin" / "rlsys").chmod(0o755)
    entrypoint = MANIFESTS[name]["spec"]["entrypoint"]
    for path in ("/rlsys", "/runs"):
        entrypoint = entrypoint.replace(path, f"{tmp_path}{path}")
    submit = f"{sys.executable} -c 'import subprocess, sys; print(subprocess.list2cmdline(sys.argv[1:]))'"
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin"}

    def shell(command: str) -> str:
        return subprocess.check_output(["bash", "-c", command], env=environment, text=True)

    on_head = shell(f"if true ; then {submit} -- {entrypoint} ; fi ;").removeprefix("-- ")
    first = shell(on_head).strip()
    (tmp_path / "runs/cluster/metrics.jsonl").touch()
    again = shell(shell(f"{submit} {entrypoint} ;")).strip()
    assert first.startswith(f"in {tmp_path}/rlsys: train configs/cluster.yaml resources.address=auto")
    assert again == f"{first} --resume"


def test_what_the_cluster_refers_to_is_there() -> None:
    documents = {
        (d["kind"], d["metadata"]["name"]): d
        for file in ("redis.yaml", "storage.yaml")
        for d in yaml.safe_load_all((DIRECTORY / file).read_text())
    }
    for manifest in MANIFESTS.values():
        cluster = cluster_spec(manifest)
        host, _, port = cluster["gcsFaultToleranceOptions"]["redisAddress"].partition(":")
        assert documents["Service", host]["spec"]["ports"] == [{"port": int(port)}]
        for _, group in groups(cluster):
            for volume in group["template"]["spec"]["volumes"]:
                if claim := volume.get("persistentVolumeClaim"):
                    assert ("PersistentVolumeClaim", claim["claimName"]) in documents
    secret = cluster_spec(MANIFESTS["raycluster"])["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]
    (container,) = documents["Deployment", "redis"]["spec"]["template"]["spec"]["containers"]
    assert container["env"][0]["valueFrom"] == secret
