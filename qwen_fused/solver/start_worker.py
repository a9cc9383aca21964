"""One worker process of a start: trains a copy of the start on a task, sends where it led, and waits for the next.

What goes wrong ends it: whoever asks tries the training once more with another.
"""

from __future__ import annotations

from multiprocessing.connection import Connection

from qwen_fused.solver.question import Job
from qwen_fused.solver.start_message import Asked, trained_bytes
from qwen_fused.solver.start_training import train_one
from qwen_fused.solver.worker import answer_each, run_as_worker


def serve(job: Job, connection: Connection) -> None:
    """Train until the other side closes."""

    def answer(content: bytes) -> bytes:
        asked = Asked.from_bytes(content)
        # strict: every parameter is sent, and there are no buffers
        job.agent.load_state_dict(asked.weights)
        return trained_bytes(train_one(job.agent, asked.one, asked.encoded, job.settings))  # type: ignore[arg-type]

    answer_each(connection, answer)


def main() -> None:
    """`python -m qwen_fused.solver.start_worker NUMBER`: as `qwen_fused.solver.worker` is started."""
    run_as_worker(serve)


if __name__ == "__main__":
    main()
