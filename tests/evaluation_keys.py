"""What an evaluation adds to its step's line of metrics.jsonl."""

from __future__ import annotations

STUDENT_KEYS = ("valid_ce_nats", "valid_accuracy", "valid_tokens", "valid_ece")
THIRDS = ("easy", "medium", "hard")
# Where the teacher's scores are known.
TEACHER_KEYS = (
    "teacher_valid_ce_nats",
    "teacher_lead_nats",
    "teacher_better_share",
    *(f"valid_ce_{third}_nats" for third in THIRDS),
    *(f"teacher_valid_ce_{third}_nats" for third in THIRDS),
    "teacher_valid_ece",
    "teacher_tv_bound",
)
