"""Greedy and beam search against searches that recompute everything, and lines of text."""

from __future__ import annotations

import math
import operator

import pytest
import torch

from cvm_translator.models.decoding import pad_sources, split_long, translate_ids, translate_texts
from cvm_translator.quantization import AdvancedQuantizer, convert_with_plan, find_plan

FORBIDDEN = [0, 1, 3]
EXACT_FORMS = ("float32", "float16", "int8_weights", "int4/padded")


@torch.no_grad()
def compute_log_probs(model, source, prefix):
    """log p of the next token after a prefix, nothing cached."""
    src, mask = pad_sources([source], "cpu")
    hidden, matrix = model(src, mask, torch.tensor([[2, *prefix]]))
    logits = (hidden @ matrix.T)[0, -1]
    logits[FORBIDDEN] = -math.inf
    return logits.log_softmax(-1).tolist()


def limit_of(model, source, ratio, extra):
    return min(int(ratio * len(source)) + extra, model.config.max_length - 1)


def greedy_reference(model, source, ratio=2.0, extra=10):
    output = []
    while len(output) < limit_of(model, source, ratio, extra):
        scores = compute_log_probs(model, source, output)
        best = max(range(len(scores)), key=scores.__getitem__)
        if best == 2:
            break
        output.append(best)
    return output


def beam_reference(model, source, beam_size, length_penalty=1.0, ratio=2.0, extra=10):
    limit = limit_of(model, source, ratio, extra)
    beams, finished = [(0.0, [])], []
    for _ in range(limit):
        candidates = [
            (score + log_prob, tokens, token)
            for score, tokens in beams
            for token, log_prob in enumerate(compute_log_probs(model, source, tokens))
            if log_prob > -math.inf
        ]
        candidates.sort(key=lambda candidate: -candidate[0])
        finished += [
            (score / (len(tokens) + 1) ** length_penalty, tokens)
            for score, tokens, token in candidates[:beam_size]
            if token == 2
        ]
        beams = [(score, [*tokens, token]) for score, tokens, token in candidates if token != 2][:beam_size]
        if len(finished) >= beam_size:
            break
    else:
        finished += [(score / len(tokens) ** length_penalty, tokens) for score, tokens in beams]
    return max(finished, key=lambda hypothesis: hypothesis[0])[1]


def make_sources(seed=0, count=17, vocab_size=14, longest=12):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(4, vocab_size, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("seed", range(4))
def test_greedy(make_model, seed):
    model, sources = make_model(seed=seed), make_sources(seed)
    expected = [greedy_reference(model, source) for source in sources]
    assert len({tuple(output) for output in expected}) > 3  # the outputs do differ
    for batch_size in (1, 5, 64):
        assert translate_ids(model, sources, batch_size=batch_size) == expected


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("beam_size", "length_penalty"), [(2, 1.0), (4, 1.0), (4, 0.3), (20, 1.0)])
def test_beam(make_model, seed, beam_size, length_penalty):
    model, sources = make_model(seed=seed), make_sources(seed, count=6, longest=6)
    expected = [beam_reference(model, source, beam_size, length_penalty, 1.0, 3) for source in sources]
    for batch_size in (1, 64):
        actual = translate_ids(
            model,
            sources,
            beam_size=beam_size,
            batch_size=batch_size,
            length_penalty=length_penalty,
            max_length_ratio=1.0,
            max_length_extra=3,
        )
        assert actual == expected


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_fake_quantised_model_decodes_as_its_deployed_form(make_model, bits):
    model, sources = make_model(seed=1), make_sources()
    quantizer = AdvancedQuantizer("progressive", 4, group_size=16)
    deployed = convert_with_plan(model, dict.fromkeys(find_plan(model), quantizer.find_format(bits)))
    expected = translate_ids(deployed, sources)
    quantizer.prepare(model, bits=bits)
    assert translate_ids(model, sources) == expected
    assert model.embedding.fake_quantization  # and the model itself is left as it was


def test_every_format_is_searched_as_exactly_as_float(make_model, form, deploy):
    model, sources = deploy(make_model(seed=1)), make_sources(count=10, longest=8)
    expected = [greedy_reference(model, source) for source in sources]
    for batch_size in (1, 64):
        same = sum(map(operator.eq, translate_ids(model, sources, batch_size=batch_size), expected))
        # Rounded activations may fall on either side; one token differs, then all that follow.
        assert same == len(sources) if form in EXACT_FORMS else same >= 0.6 * len(sources)
    beams = [beam_reference(model, source, 2, 1.0, 1.0, 3) for source in sources[:4]]
    actual = translate_ids(model, sources[:4], beam_size=2, max_length_ratio=1.0, max_length_extra=3)
    assert sum(map(operator.eq, actual, beams)) >= (4 if form in EXACT_FORMS else 2)


def test_lengths_and_specials(make_model):
    model = make_model(seed=2)
    with torch.no_grad():
        model.embedding.weight[:4].mul_(20.0)  # specials would be likely
    outputs = translate_ids(model, make_sources(), max_length_ratio=1.5, max_length_extra=2)
    for source, output in zip(make_sources(), outputs, strict=True):
        assert len(output) <= 1.5 * len(source) + 2
        assert not {0, 1, 2, 3} & set(output)
    long = translate_ids(model, [[5] * 23], max_length_ratio=9.0)[0]
    assert len(long) <= 23


def test_training_mode_and_random_state_are_left_alone(make_model):
    model = make_model().train()
    before = torch.get_rng_state()
    translate_ids(model, make_sources())
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    model(*pad_sources([[4, 5]], "cpu"), torch.tensor([[2, 4]]))[0].sum().backward()  # no inference tensors remain


@pytest.mark.parametrize("bad", [[], [4] * 24])
def test_sources_that_cannot_be_translated_are_refused(make_model, bad):
    with pytest.raises(ValueError, match="between 1 and 23"):
        translate_ids(make_model(), [[4], bad])


def test_nothing_to_translate(make_model, tokenizer):
    model = make_model(tokenizer.vocab_size)
    assert translate_ids(model, []) == []
    assert translate_texts(model, tokenizer, []) == []
    assert translate_texts(model, tokenizer, ["", "  "]) == ["", ""]


def test_lines_keep_their_places(make_model, tokenizer):
    model = make_model(tokenizer.vocab_size)
    texts = ["kara lone.", "", "misos tura kane.", "  ", "lo"]
    together = translate_texts(model, tokenizer, texts)
    assert together[1] == together[3] == ""
    assert together == [translate_texts(model, tokenizer, [text])[0] for text in texts]
    expected = tokenizer.decode([greedy_reference(model, ids) for ids in tokenizer.encode(texts[:1])])[0]
    assert together[0] == expected


def test_long_lines_are_cut_and_nothing_is_lost(make_model, tokenizer):
    sentence = "karas lone misos turald kane lorald mira tune."
    text = " ".join([sentence] * 6) + " " + "x" * 50
    longest = 23
    pieces = split_long(tokenizer, text, longest)
    assert all(0 < len(piece) <= longest for piece in pieces)
    assert " ".join(tokenizer.decode(pieces)).replace(" ", "") == text.replace(" ", "")
    model = make_model(tokenizer.vocab_size)
    translated = [tokenizer.decode([greedy_reference(model, piece)])[0] for piece in pieces]
    assert translate_texts(model, tokenizer, [text]) == [" ".join(translated)]


def test_cuts_prefer_sentence_ends(tokenizer):
    sentence = "kara lone misos."
    length = len(tokenizer.encode([sentence])[0])
    pieces = split_long(tokenizer, " ".join([sentence] * 3), 2 * length + 2)
    assert tokenizer.decode(pieces) == [f"{sentence} {sentence}", sentence]
