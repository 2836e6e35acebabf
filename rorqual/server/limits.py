"""How much one client may ask for, and how much may be asked at once."""

from __future__ import annotations

from rorqual.records import Record


class ServerLimits(Record):
    """max_waiting: requests that may wait for a slot; one more is refused with 429. max_new_tokens: longest answer that
    a client may ask for, 0 for whatever the window leaves. request_timeout_seconds: from a request's last byte to its
    answer's last; send_timeout_seconds: how long a reader may refuse the next piece; body_timeout_seconds: how long a
    body may take to arrive."""

    max_waiting: int = 128
    max_body_bytes: int = 8 * 2**20
    max_messages: int = 4096
    max_choices: int = 16
    max_new_tokens: int = 0
    request_timeout_seconds: float = 1800.0
    send_timeout_seconds: float = 60.0
    body_timeout_seconds: float = 30.0

    def __post_init__(self) -> None:
        """Raises: ValueError naming the field that is out of range."""
        least = {"max_waiting": 0, "max_new_tokens": 0}
        for name in self.__struct_fields__:
            value, low = getattr(self, name), least.get(name, 1)
            if value < low:
                raise ValueError(f"ServerLimits.{name} = {value}; expected at least {low}.")
