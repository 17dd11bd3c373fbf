"""Times and bytes as a person says them: the one place that rounds them. Shared by all layers; knows none of them."""

from __future__ import annotations


def in_bytes(size: float) -> str:
    """Bytes in the largest unit that leaves a number of 1 or more; two digits at least are told.

    >>> in_bytes(900), in_bytes(1536), in_bytes(45_000), in_bytes(3_070_000_000)
    ('900 bytes', '1.5 kB', '45 kB', '3.1 GB')
    """
    for name, unit in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        # what rounds to 1000 of a unit is 1.0 of the next
        if size >= 0.9995 * unit:
            value = size / unit
            return f"{value:.0f} {name}" if value >= 9.95 else f"{value:.1f} {name}"
    return f"{size:.0f} bytes"


def duration(seconds: float) -> str:
    """A time as a person says it.

    >>> duration(0.2), duration(8.4), duration(150), duration(5400), duration(200_000)
    ('under 1 s', '8 s', '2.5 min', '1.5 h', '2.3 days')
    """
    if seconds < 1:
        return "under 1 s"
    for least, unit, name in ((86_400, 86_400, "days"), (3_600, 3_600, "h"), (60, 60, "min")):
        if seconds >= least * 1.5 or (name != "days" and seconds >= least):
            value = seconds / unit
            return f"{value:.0f} {name}" if value >= 10 else f"{value:.1f} {name}".replace(".0 ", " ")
    return f"{seconds:.0f} s"


def clock(seconds: float) -> str:
    """A time that goes on, as a clock shows it: it stays as wide while it counts.

    >>> clock(8.4), clock(605), clock(3661), clock(200_000)
    ('0:08', '10:05', '1:01:01', '55:33:20')
    """
    minutes, rest = divmod(int(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
