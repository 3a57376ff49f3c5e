"""Asynchronous actor/learner reinforcement learning for language models, with staleness visible and measured."""
