"""How a training of another program reports its speed."""

import json
import time

EVERY = 0.5  # seconds at least between two lines


class Report:
    """Prints JSON lines with the names of metrics.jsonl: `step` and `speed/agent_steps_per_s`.

    Args:
        step: agent steps so far.
    """

    def __init__(self, step: int) -> None:
        self.step, self.time = step, time.perf_counter()

    def __call__(self, step: int) -> None:
        """Print a line about the steps up to `step`, unless the last one was printed just now."""
        now = time.perf_counter()
        if now - self.time >= EVERY:
            rate = (step - self.step) / (now - self.time)
            print(json.dumps({"step": step, "speed/agent_steps_per_s": rate}), flush=True)
            self.step, self.time = step, now
