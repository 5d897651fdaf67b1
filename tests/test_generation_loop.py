"""The decoding loop against transformers: what is generated, in what distribution, and when it ends."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, TopPLogitsWarper

from reformer_kernels.models.generation import GenerationOptions, generate, keep_top_p, stream

V, PAD, T = 40, 7, 12
EOS = [3, 11, 26]
PROMPTS = [[5, 9, 2], [1], [8, 30, 12, 7, 31], [20, 33]]  # PAD is a token of the third, too
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, an eos": {"eos_token_id": 3},
    "greedy, several eos": {"eos_token_id": EOS},
    "greedy, no end before": {"eos_token_id": EOS, "min_new_tokens": 4},
    "greedy, never an end": {"eos_token_id": EOS, "min_new_tokens": T},
    "greedy, penalty": {"repetition_penalty": 1.7, "eos_token_id": EOS},
    "greedy, reward": {"repetition_penalty": 0.6},
    "greedy, a token": {"max_new_tokens": 1},
    "beams": {"num_beams": 3},
    "beams, short": {"num_beams": 3, "eos_token_id": EOS, "length_penalty": 0.5},
    "beams, mean": {"num_beams": 3, "eos_token_id": EOS},
    "beams, long": {"num_beams": 3, "eos_token_id": EOS, "length_penalty": 2.0},
    "beams, punished": {"num_beams": 3, "eos_token_id": EOS, "length_penalty": -1.0},
    "beams, an eos": {"num_beams": 4, "eos_token_id": 3},
    "beams, half of the tokens end": {"num_beams": 3, "eos_token_id": list(range(0, V, 2)), "length_penalty": 3.0},
    "beams, eos is pad": {"num_beams": 3, "eos_token_id": PAD},
    "beams, early": {"num_beams": 3, "eos_token_id": EOS, "early_stopping": True, "length_penalty": 2.0},
    "beams, no end before": {"num_beams": 3, "eos_token_id": EOS, "min_new_tokens": 4},
    "beams, penalty": {"num_beams": 3, "eos_token_id": EOS, "repetition_penalty": 1.7},
    "beams, several": {"num_beams": 4, "eos_token_id": EOS, "num_return_sequences": 3},
    "beams, all, early": {"num_beams": 3, "eos_token_id": 3, "num_return_sequences": 3, "early_stopping": True},
    "beams, a token": {"num_beams": 3, "max_new_tokens": 1, "num_return_sequences": 2},
}


class Recomputing:
    """A decoder that runs the model on each row anew, without its padding."""

    def __init__(self, model: Any, prompts: list[list[int]]) -> None:
        self.model = model
        self.rows = prompts
        self.steps = 0

    def start(self, rows: int) -> Tensor:
        self.rows = [list(row) for row in self.rows for _ in range(rows // len(self.rows))]
        return self.logits()

    def step(self, token_ids: Tensor) -> Tensor:
        self.steps += 1
        for row, token in zip(self.rows, token_ids.tolist(), strict=True):
            row.append(token)
        return self.logits()

    def reorder(self, rows: Tensor) -> None:
        self.rows = [list(self.rows[row]) for row in rows.tolist()]

    def logits(self) -> Tensor:
        assert not torch.is_grad_enabled()
        return torch.stack([self.model(torch.tensor([row])).logits[0, -1] for row in self.rows])


class Fixed:
    """A decoder whose logits do not depend on what came before."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits  # [B, V]

    def start(self, rows: int) -> Tensor:
        self.logits = self.logits.repeat_interleave(rows // len(self.logits), dim=0)
        return self.logits

    def step(self, token_ids: Tensor) -> Tensor:
        assert token_ids.dtype == torch.int64
        assert token_ids.shape == self.logits.shape[:1]
        return self.logits

    def reorder(self, rows: Tensor) -> None:
        self.logits = self.logits[rows]


@pytest.fixture(scope="module")
def model() -> Any:
    """Weights so large that it does not repeat one token; float64, so that nobody's rounding decides."""
    torch.manual_seed(2)
    config = GPT2Config(
        vocab_size=V, n_layer=2, n_embd=32, n_head=2, n_positions=64, initializer_range=0.3,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double().eval()


def made(**changes: Any) -> GenerationOptions:
    return GenerationOptions(**{"max_new_tokens": T, "pad_token_id": PAD, **changes})


def padded(prompts: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    """Prompts with padding, and their mask."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), PAD)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        begin = longest - len(prompt) if side == "left" else 0
        ids[i, begin : begin + len(prompt)] = torch.tensor(prompt)
        mask[i, begin : begin + len(prompt)] = 1
    return ids, mask


def theirs(model: Any, prompts: list[list[int]], **options: Any) -> Tensor:
    ids, mask = padded(prompts, "left")
    arguments = {"max_new_tokens": T, "pad_token_id": PAD, "do_sample": False, **options}
    result: Tensor = model.generate(ids, attention_mask=mask, **arguments)
    return result[:, ids.shape[1] :]


def ours(model: Any, prompts: list[list[int]], side: str = "left", **options: Any) -> Tensor:
    return generate(Recomputing(model, prompts), *padded(prompts, side), made(**options))


@pytest.mark.parametrize("name", OPTIONS)
def test_generates_what_transformers_does(model: Any, name: str) -> None:
    options = OPTIONS[name]
    if "repetition_penalty" in options:  # transformers also counts tokens of the padding
        rows = [row for prompt in PROMPTS for row in theirs(model, [prompt], **options)]
        expected = pad_sequence(rows, batch_first=True, padding_value=PAD)
    else:
        expected = theirs(model, PROMPTS, **options)
    for side in ("left", "right"):
        assert torch.equal(ours(model, PROMPTS, side, **options), expected)


def test_what_is_compared_differs(model: Any) -> None:
    """Each of the options matters here, and rows end at different times."""
    results = {name: ours(model, PROMPTS, **options).tolist() for name, options in OPTIONS.items()}
    del results["greedy, never an end"]  # that of no end at all, but for tokens that end
    assert all(a != b for i, a in enumerate(results.values()) for b in list(results.values())[:i])
    for name in ("greedy, several eos", "beams, short"):
        ends = [next((i for i, token in enumerate(row) if token in EOS), T) for row in results[name]]
        assert len(set(ends)) > 2, (name, ends)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_no_mask_is_no_padding(model: Any, options: dict[str, Any]) -> None:
    prompts = [[5, PAD, 2], [1, 8, 8]]
    options = {"repetition_penalty": 1.5, **options}
    ids, mask = padded(prompts, "left")
    results = []
    for given in (None, mask, mask.bool()):
        draws = torch.Generator().manual_seed(1)
        results.append(generate(Recomputing(model, prompts), ids.int(), given, made(**options), draws))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert results[0].dtype == torch.int64


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "early_stopping": True}])
@pytest.mark.parametrize("eos", [None, list(range(0, V, 3))])
def test_takes_as_many_steps_as_transformers(model: Any, options: dict[str, Any], eos: list[int] | None) -> None:
    calls: list[None] = []
    hook = model.register_forward_hook(lambda *_: calls.append(None))
    theirs(model, PROMPTS, eos_token_id=eos, **options)
    hook.remove()
    decoder = Recomputing(model, PROMPTS)
    generate(decoder, *padded(PROMPTS, "left"), made(eos_token_id=eos, **options))
    assert decoder.steps + 1 == len(calls)
    assert (len(calls) < T) == (eos is not None)


@pytest.mark.parametrize(
    "options", [{}, {"repetition_penalty": 1.3}, {"do_sample": True}, {"do_sample": True, "min_new_tokens": 3}]
)
def test_stream_is_generate(model: Any, options: dict[str, Any]) -> None:
    ids, mask = padded(PROMPTS, "left")
    chosen = made(eos_token_id=EOS, **options)
    expected = generate(Recomputing(model, PROMPTS), ids, mask, chosen, torch.Generator().manual_seed(3))
    torch.manual_seed(1)  # the global state does not matter
    columns = list(stream(Recomputing(model, PROMPTS), ids, mask, chosen, torch.Generator().manual_seed(3)))
    assert torch.equal(torch.stack(columns, dim=1), expected)


def test_stream_does_not_run_ahead(model: Any) -> None:
    decoder = Recomputing(model, PROMPTS)
    columns = stream(decoder, *padded(PROMPTS, "left"), made())
    for steps in range(3):
        assert next(columns).shape == (len(PROMPTS),)
        assert decoder.steps == steps
        assert torch.is_grad_enabled()


def test_samples_are_those_of_a_seed(model: Any) -> None:
    ids, mask = padded(PROMPTS, "left")
    options = made(do_sample=True, num_return_sequences=3, eos_token_id=3)

    def draw(generator: torch.Generator | None) -> Tensor:
        return generate(Recomputing(model, PROMPTS), ids, mask, options, generator)

    first, again, other = (draw(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert len(first) == 3 * len(PROMPTS)
    assert torch.equal(first, again)
    assert first.tolist() != other.tolist()
    torch.manual_seed(9)
    first = draw(None)
    torch.manual_seed(9)
    assert torch.equal(first, draw(None))


@pytest.mark.parametrize(
    "options",
    [
        {}, {"top_k": None}, {"top_k": 0}, {"top_k": 4}, {"top_k": 1}, {"top_k": None, "top_p": 0.7}, {"top_p": 0.0},
        {"temperature": 0.5}, {"temperature": 2.5, "top_k": 10, "top_p": 0.6}, {"temperature": 0.7, "top_p": 0.9},
        {"repetition_penalty": 3.0, "top_k": 6}, {"min_new_tokens": 1, "eos_token_id": EOS, "top_k": 8},
    ],
)  # fmt: skip
def test_samples_have_the_distribution_of_transformers(model: Any, options: dict[str, Any]) -> None:
    """A first token from random logits of which some are equal. Of so many samples each count is within 5 sigma."""
    n, prompt = 4000, torch.tensor([[4, 9, 9], [1, 2, 3]])
    logits = (3 * torch.randn(2, V)).round(decimals=0)
    logits[:, EOS] += 3
    config = GenerationConfig(**{"do_sample": True, "top_k": 50, "num_beams": 1, **options})
    eos = options.get("eos_token_id")
    config._eos_token_tensor = None if eos is None else torch.tensor(eos)
    processors = model._get_logits_processor(config, input_ids_seq_length=3, device="cpu")
    expected = processors(prompt, logits.clone()).softmax(dim=-1)

    samples = generate(
        Fixed(logits), prompt, None, made(max_new_tokens=1, do_sample=True, num_return_sequences=n, **options)
    )
    for row, p in zip(samples.view(2, n), expected, strict=True):
        counts = row.bincount(minlength=V)
        assert not counts[p == 0].any()
        assert ((counts - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt() + 1).all()


def test_samples_of_a_row_are_beside_each_other() -> None:
    logits = torch.full((2, V), -torch.inf)
    logits[0, :2] = logits[1, 2:4] = 0
    samples = generate(
        Fixed(logits), torch.ones(2, 1, dtype=torch.int64), None, made(do_sample=True, num_return_sequences=50)
    )
    assert samples[:50].unique().tolist() == [0, 1]
    assert samples[50:].unique().tolist() == [2, 3]


def test_penalty_counts_what_was_generated() -> None:
    """Every token is tried once before one comes twice; of the prompt none, not even its token of the padding."""
    logits = torch.arange(V, 0, -1.0).view(1, V)
    prompt, mask = torch.tensor([[1, 0, 5]]), torch.tensor([[0, 1, 1]])
    result = generate(Fixed(logits), prompt, mask, made(max_new_tokens=5, repetition_penalty=1000.0))
    assert result.tolist() == [[1, 2, 3, 4, 6]]


def test_logits_of_half_types_are_normalised_in_float32() -> None:
    logits = torch.randn(2, V).bfloat16()
    prompt = torch.ones(2, 1, dtype=torch.int64)
    for options in ({"num_beams": 3, "num_return_sequences": 3}, {"repetition_penalty": 1.1}):
        half, full = (generate(Fixed(x), prompt, None, made(**options)) for x in (logits, logits.float()))
        assert torch.equal(half, full)


def test_nucleus_of_equal_tokens() -> None:
    """Where some sum up to exactly top_p, no more than these are left."""
    logits = torch.zeros(1, 4)
    for p in (0.25, 0.5, 0.75):
        assert keep_top_p(logits, p).equal(TopPLogitsWarper(p)(torch.zeros(1, 1, dtype=torch.int64), logits))


def test_more_beams_than_tokens() -> None:
    result = generate(
        Fixed(torch.tensor([[0.0, 1.0]])),
        torch.zeros(1, 1, dtype=torch.int64),
        None,
        made(max_new_tokens=2, num_beams=4, num_return_sequences=4, pad_token_id=0),
    )
    assert result.tolist()[0] == [1, 1]
    assert result.tolist()[3] == [0, 0]
    assert sorted(result.tolist()) == [[0, 0], [0, 1], [1, 0], [1, 1]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.5}, "temperature=0.5 has no effect without do_sample=True"),
        ({"top_k": 3}, "top_k=3 has no effect without do_sample=True"),
        ({"top_p": 0.5, "num_beams": 2}, "top_p=0.5 has no effect without do_sample=True"),
        ({"length_penalty": 2.0}, "length_penalty=2.0 has no effect without num_beams above 1"),
        ({"early_stopping": True, "do_sample": True}, "early_stopping=True has no effect without num_beams above 1"),
    ],
)
def test_options_without_effect(changes: dict[str, Any], message: str) -> None:
    with pytest.warns(UserWarning) as warned:
        made(**changes)
    assert [str(warning.message) for warning in warned] == [message]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens must be an int, got 2.0"),
        ({"min_new_tokens": T + 1}, ValueError, f"min_new_tokens must be at most max_new_tokens, {T}, got {T + 1}"),
        ({"min_new_tokens": -1}, ValueError, "min_new_tokens must be at least 0, got -1"),
        ({"do_sample": 1}, TypeError, "do_sample must be a bool, got 1"),
        ({"early_stopping": "never"}, TypeError, "early_stopping must be a bool, got 'never'"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive, got 0.0"),
        ({"temperature": float("inf")}, ValueError, "temperature must be finite, got inf"),
        ({"repetition_penalty": -1.0}, ValueError, "repetition_penalty must be positive, got -1.0"),
        ({"repetition_penalty": True}, TypeError, "repetition_penalty must be a float, got True"),
        ({"length_penalty": "1"}, TypeError, "length_penalty must be a float, got '1'"),
        ({"top_k": -1}, ValueError, "top_k must be at least 0, got -1"),
        ({"top_p": 1.5}, ValueError, "top_p must be between 0 and 1, got 1.5"),
        ({"num_beams": 0}, ValueError, "num_beams must be at least 1, got 0"),
        ({"num_beams": 2, "do_sample": True}, ValueError, "num_beams must be 1 with do_sample=True"),
        ({"num_return_sequences": 2}, ValueError, "num_return_sequences must be 1 without do_sample=True or num_beams"),
        (
            {"num_return_sequences": 3, "num_beams": 2},
            ValueError,
            "num_return_sequences must be at most num_beams, 2, got 3",
        ),
        ({"eos_token_id": 1.5}, TypeError, "eos_token_id must be an int, a sequence of them or None, got 1.5"),
        ({"eos_token_id": [1, -1]}, ValueError, "eos_token_id must be at least 0, got -1"),
        ({"eos_token_id": "</s>"}, TypeError, "eos_token_id must be an int, got '<'"),
        ({"pad_token_id": -1}, ValueError, "pad_token_id must be at least 0, got -1"),
        ({"pad_token_id": None}, TypeError, "pad_token_id must be an int, got None"),
    ],
)
def test_options_that_are_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        made(**changes)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prompt_ids": [[1]]}, TypeError, "prompt_ids must be a torch.Tensor, got list"),
        ({"prompt_ids": torch.zeros(2, 3)}, TypeError, "prompt_ids must have dtype torch.int64 or torch.int32"),
        ({"prompt_ids": torch.ones(3).long()}, ValueError, "prompt_ids must have 2 dimensions [B, L], got shape (3,)"),
        ({"prompt_ids": torch.ones(0, 3).long()}, ValueError, "prompt_ids must have at least one row"),
        ({"prompt_mask": torch.ones(2, 4)}, ValueError, "prompt_mask must have shape [2, 3], got [2, 4]"),
        ({"prompt_mask": 1}, TypeError, "prompt_mask must be a torch.Tensor, got int"),
        ({"options": {}}, TypeError, "options must be GenerationOptions, got {}"),
        ({"options": made(eos_token_id=[1, V])}, ValueError, "eos_token_id must be between 0 and 39, got 40"),
        ({"options": made(pad_token_id=V)}, ValueError, "pad_token_id must be between 0 and 39, got 40"),
        ({"options": made(pad_token_id=V, num_beams=2)}, ValueError, "pad_token_id must be between 0 and 39, got 40"),
    ],
)
def test_arguments_that_are_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"prompt_ids": torch.ones(2, 3).long(), "prompt_mask": None, "options": made(), **changes}
    with pytest.raises(error) as raised:
        generate(Fixed(torch.zeros(2, V)), **arguments)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("options", "name"),
    [({"num_beams": 2}, "num_beams"), ({"do_sample": True, "num_return_sequences": 2}, "num_return_")],
)
def test_a_stream_is_refused_when_it_is_made(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}\w* must be 1 to stream tokens, got 2"):
        stream(Fixed(torch.zeros(2, V)), torch.ones(2, 3).long(), None, made(**options))
