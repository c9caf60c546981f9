"""Curves, by the question about a run that they answer."""

CHARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "Does it explore?": {
        "distance of an episode, pixels": ("episode/distance",),
        "share of episodes at a flag": ("episode/flag",),
        "cells discovered": ("explore/cells",),
        "levels discovered": ("explore/levels",),
    },
    "Does its curiosity learn?": {
        "inverse gain, nats": ("icm/inverse_gain",),
        "loss of the forward model": ("loss/forward",),
        "intrinsic reward per agent step": ("reward/intrinsic",),
    },
    "Does the learner learn?": {
        "entropy of the policy, nats": ("policy/entropy",),
        "mean value": ("value/mean", "q/mean"),
        "loss of the values": ("loss/value", "loss/q"),
        "divergence from the policy that acted, nats": ("policy/kl",),
    },
    "Is it fast?": {
        "agent steps per second": ("speed/agent_steps_per_s",),
        "shares of the time": (
            "speed/act_share",
            "speed/observe_share",
            "speed/update_share",
            "speed/wait_share",
        ),
    },
}
"""Charts by question, and the metrics of each by its title; a run has those of its learner."""
