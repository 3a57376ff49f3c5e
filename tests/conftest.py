"""What holds for all tests."""

from hypothesis import HealthCheck, settings

# A busy machine is no failure: tests say what they demand of time themselves.
settings.register_profile("rlsys", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("rlsys")
