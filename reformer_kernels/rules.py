"""AttentionRules: which keys a query may use and how its scores and rounds are combined. Presets are data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache

LARGEST = 3.4028234e38  # of float32
CHOICES: dict[str, tuple[str, ...]] = {
    "key_norm": ("rms", "l2"),
    "own_position": ("last_resort", "sentinel"),
    "dedup": ("none", "log_count"),
    "combine_rounds": ("softmax", "exp_lse"),
    "window_order": ("position", "self_first"),
}


@dataclass(frozen=True, kw_only=True)
class AttentionRules:
    """The choices in which the published Reformers differ.

    The default is the Reformer as trax computes it, made exact: no sentinel scores, so that a token that sees only
    itself gets exactly its own value in every dtype. Sources: "Reformer", arXiv 2001.04451, section 2 and appendix A;
    trax ``efficient_attention.py``; Hugging Face ``modeling_reformer.py``; lucidrains ``reformer_pytorch.py``.

    Args:
        key_norm: how a shared row becomes a unit key: ``"rms"`` is ``q * rsqrt(mean(q**2) + 1e-6) / sqrt(D)``,
            ``"l2"`` is ``q / max(|q|, 1e-12)``.
        scale: factor on ``q @ unit_key``; None means ``D ** -0.5``.
        own_position: ``"last_resort"``: a query uses its own key only if it has no other allowed key in any round.
            ``"sentinel"``: its own score is replaced by ``own_value``, other masked scores by ``mask_value``. The
            kernels serve it (with ``combine_rounds="exp_lse"``, in a ring) for scores that lie far above both.
        own_value, mask_value: the sentinels; ``mask_value=None`` means ``-finfo(dtype).max``.
        padding_bucket: hash padded tokens into one extra, last bucket (otherwise by content).
        mask_padded_queries: padded tokens see nothing as queries, either.
        cut_padding: what a row has behind its last token that is no padding is cut off before windows are placed, so
            that the row does not depend on the length to which its batch is padded; the outputs there are 0.
        within_bucket: a key must share the query's bucket in that round.
        dedup: ``"log_count"`` subtracts ``log N`` from the score of a key that the query meets N times over all rounds,
            so that it counts once.
        combine_rounds: ``"softmax"`` over the rounds' logsumexp, or ``"exp_lse"``: ``exp(l - logsumexp(l))``, which
            rounds differently next to sentinels.
        window_order: ``"position"`` (chunks before ... after) or ``"self_first"`` (own chunk first); changes only the
            order of summation.

    Raises:
        ValueError: a field has a value that is not listed above.
    """

    key_norm: str = "rms"
    scale: float | None = 1.0
    own_position: str = "last_resort"
    own_value: float = -1e5
    mask_value: float | None = -1e9
    padding_bucket: bool = True
    mask_padded_queries: bool = False
    cut_padding: bool = True
    within_bucket: bool = False
    dedup: str = "none"
    combine_rounds: str = "softmax"
    window_order: str = "position"
    key: str = field(init=False, repr=False, compare=False, default="")  # the rules as one string, for op schemas

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"AttentionRules.{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name in ("scale", "own_value", "mask_value"):
            value = getattr(self, name)
            if value is None and name != "own_value":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
                raise ValueError(f"AttentionRules.{name} must be a finite number, got {value!r}")
        for f in fields(self):
            if isinstance(f.default, bool) and not isinstance(getattr(self, f.name), bool):
                raise ValueError(f"AttentionRules.{f.name} must be True or False, got {getattr(self, f.name)!r}")
        values = asdict(self)
        del values["key"]
        object.__setattr__(self, "key", json.dumps(values))

    @staticmethod
    @lru_cache(maxsize=64)
    def from_key(key: str) -> AttentionRules:
        """The rules that ``rules.key`` describes."""
        return AttentionRules(**json.loads(key))

    @classmethod
    def paper(cls) -> AttentionRules:
        """The paper's equations 4 to 6 and 16: keys of the same bucket only, duplicates across rounds counted once."""
        return cls(within_bucket=True, dedup="log_count")

    @classmethod
    def trax(cls) -> AttentionRules:
        """The rules of trax at its last commit: the default."""
        return cls()

    @classmethod
    def lucidrains(cls) -> AttentionRules:
        """The defaults of ``reformer_pytorch.LSHAttention``. Its heads share their rotations: pass ``rotations``."""
        return cls(
            key_norm="l2",
            scale=None,
            own_position="sentinel",
            own_value=-5e4,
            mask_value=None,
            padding_bucket=False,
            mask_padded_queries=True,
            cut_padding=False,
            combine_rounds="exp_lse",
            window_order="self_first",
        )

    @classmethod
    def huggingface(cls, *, half: bool = False) -> AttentionRules:
        """The rules of ``ReformerModel``; ``half=True`` takes the sentinels that it uses in float16."""
        own_value, mask_value = (-1e3, -1e4) if half else (-1e5, -1e9)
        return cls(
            own_position="sentinel", own_value=own_value, mask_value=mask_value, cut_padding=False,
            combine_rounds="exp_lse",
        )  # fmt: skip

    def differences(self) -> dict[str, object]:
        """The fields that differ from the default."""
        default = AttentionRules()
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.compare and getattr(self, f.name) != getattr(default, f.name)
        }
