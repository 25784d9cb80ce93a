"""The penalty for responses that come near the length limit."""

from __future__ import annotations


def soft_overlong_penalty(length: int, *, max_length: int, buffer_length: int) -> float:
    """0, then falling to -1 over the last ``buffer_length`` tokens (DAPO, arXiv:2503.14476, eq. 13).

    :param length: tokens of the response.
    :param max_length: the length at which the penalty has become -1 (L_max); longer responses keep -1.
    :param buffer_length: tokens before ``max_length`` over which it falls (L_cache); 0 penalizes only longer ones.
    :raises ValueError: a negative length, or a buffer that is longer than ``max_length``.
    """
    if length < 0 or max_length < 1 or not 0 <= buffer_length <= max_length:
        raise ValueError(
            f"soft_overlong_penalty(length={length}, max_length={max_length}, buffer_length={buffer_length}): "
            "needs length >= 0, max_length >= 1 and 0 <= buffer_length <= max_length"
        )
    free = max_length - buffer_length
    if length <= free:
        return 0.0
    if length > max_length:
        return -1.0
    return (free - length) / buffer_length
