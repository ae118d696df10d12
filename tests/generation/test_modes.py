"""`generate` in every mode, free-running answers, guidance and drafts: all give what teacher forcing says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoProcessor

from ernie_elastic.compression import compress_directory
from ernie_elastic.data.groups.grouping import build_document
from ernie_elastic.data.groups.tokens import Tokens
from ernie_elastic.data.packed.batch_rows import select_rows, stack_rows
from ernie_elastic.data.packed.packing import collate
from ernie_elastic.data.prepare.tokenise import Tokenizers
from ernie_elastic.elastic.extract import save_model
from ernie_elastic.errors import CheckpointError, ConfigError, DataError
from ernie_elastic.generation.decoder import GroupDecoder, Guidance, Sampling
from ernie_elastic.generation.modes import run_free
from ernie_elastic.generation.text import decode_text
from ernie_elastic.generation.visual import decode_visual
from ernie_elastic.modeling import ErnieElasticForCausalLM
from ernie_elastic.modeling.document_layout import layout_of
from ernie_elastic.modeling.processing import ErnieElasticProcessor
from ernie_elastic.modeling.sizes import ModelSizes
from ernie_elastic.pipeline.generate import write_media
from ernie_elastic.tokenizers.audio.spectral import SpectralAudioTokenizer, SpectralAudioTokenizerConfig
from ernie_elastic.tokenizers.text.tokenizer import TextTokenizer
from ernie_elastic.tokenizers.visual.patch import PatchVisualTokenizer, PatchVisualTokenizerConfig
from tests.modeling.common import RICH, random_parts, tiny_model

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def processor() -> ErnieElasticProcessor:
    torch.manual_seed(0)
    text = TextTokenizer.train(["a red circle and a blue square", "what is it ?"] * 20, 320)
    visual = PatchVisualTokenizer(PatchVisualTokenizerConfig(image_size=16, patch=4, num_bits=5, width=16)).eval()
    audio = SpectralAudioTokenizer(SpectralAudioTokenizerConfig(num_components=8, num_levels=2, codebook_size=11))
    audio.basis_FC.normal_()
    audio.codebooks_QVC.normal_()
    tokenizers = Tokenizers(text, visual, audio)
    sizes = ModelSizes(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        moe_intermediate_size=16,
        num_experts=4,
        understanding_width=16,
        initializer_range=0.2,
    )
    return ErnieElasticProcessor(tokenizers, sizes.to_config(tokenizers))


@pytest.fixture(scope="module")
def model(processor) -> ErnieElasticForCausalLM:
    torch.manual_seed(0)
    return ErnieElasticForCausalLM(processor.config).eval()


def messages(rng: np.random.Generator) -> list[dict]:
    picture = rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)
    clip = rng.integers(0, 256, (4, 16, 16, 3)).astype(np.uint8)
    wave = rng.normal(size=3000).astype(np.float32).clip(-1, 1)
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "what is it ?"}]
    parts += [{"type": "video", "video": clip}, {"type": "audio", "audio": wave}]
    return [{"role": "user", "content": parts}, {"role": "user", "content": "a red circle"}]


def test_a_chat_becomes_one_prompt_with_its_media_in_order(processor, model):
    inputs = processor.apply_chat_template(messages(np.random.default_rng(0)))
    types = inputs["mm_token_type_ids"][0]
    assert types.unique_consecutive().tolist() == [0, 1, 0, 2, 0, 3, 0]
    assert (types == 1).sum() == 4 and (types == 2).sum() == 4 and (types == 3).sum() == 3  # 2x2 tokens, 3 x 80 ms
    text = processor.apply_chat_template(messages(np.random.default_rng(0)), tokenize=False)
    assert text == "<|image|>what is it ?<|video|><|audio|>a red circle"
    again = processor(text=text, images=inputs_media(0), videos=inputs_media(1), audio=inputs_media(2))
    assert torch.equal(again["input_ids"], inputs["input_ids"])
    whole = model.forward_packed(inputs["packed"]).hidden_BTH
    logits = model(**{k: v for k, v in inputs.items() if k == "packed"}).logits
    assert (logits - model.lm_head(whole)).abs().max() <= TOLERANCE


def inputs_media(index: int) -> list[np.ndarray]:
    parts = messages(np.random.default_rng(0))[0]["content"]
    return [part[part["type"]] for part in parts if part["type"] == ("image", "video", "audio")[index]]


@pytest.mark.parametrize("mode", ["text", "image", "video", "audio"])
def test_every_mode_gives_media_and_batches_equal_single_rows(processor, model, mode):
    rng = np.random.default_rng(1)
    chats = [messages(rng), [{"role": "user", "content": "a blue square"}]]
    sampling = Sampling(max_new_tokens=6, max_frames=2, max_audio_steps=3)
    both = processor.apply_chat_template(chats)
    media = processor.post_process_multimodal_output(
        model.generate(**both, generation_mode=mode, sampling=sampling), generation_mode=mode
    )
    for row, chat in enumerate(chats):
        alone = processor.apply_chat_template(chat)
        output = model.generate(**alone, generation_mode=mode, sampling=sampling)
        (single,) = processor.post_process_multimodal_output(output, generation_mode=mode)
        if mode == "text":
            assert single == media[row]
        else:
            assert single.shape == media[row].shape and np.array_equal(single, media[row])
    shapes = {"image": (16, 16, 3), "video": (media[0].shape[0] if mode == "video" else 0, 16, 16, 3)}
    assert mode in ("text", "audio") or media[0].shape == shapes[mode]


def test_plain_text_generation_stays_transformers_own(processor, model):
    ids = torch.tensor([[1, *processor.tokenizers.text.encode("a red circle")]])
    theirs = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    inputs = processor(text="a red circle")
    assert torch.equal(inputs["input_ids"], ids)
    ours = model.generate(**inputs, generation_mode="text", max_new_tokens=8)[0].tolist()
    generated = theirs[0, ids.shape[1] :].tolist()
    assert ours == (generated[: generated.index(2)] if 2 in generated else generated)


def free_answer(processor, seed, steps):
    """A model whose openers are likely, its decoder after a free-running answer, the parts, and every bit drawn."""
    layout = layout_of(processor.config)
    torch.manual_seed(seed)
    model = ErnieElasticForCausalLM(processor.config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[[layout.special.boi, layout.special.bov, layout.special.boa]] *= 3.0
    sampling = Sampling(temperature=1.0, seed=seed, max_new_tokens=6, max_frames=2, max_audio_steps=steps)
    decoder = GroupDecoder(model, layout, sampling=sampling)
    bits, choose = [], decoder.choose_bits
    decoder.choose_bits = lambda logits: bits.append(choose(logits)) or bits[-1]
    prompt = Tokens("text", "input", ids=np.array([20, 21], dtype=np.int32))
    decoder.prefill([build_document([prompt], layout)])
    return model, decoder, prompt, run_free(decoder), bits


@pytest.mark.parametrize("steps", [2, 200], ids=["sounds cut short", "sounds that end"])
def test_free_running_answers_leave_the_state_of_documents_that_hold_them(processor, steps):
    layout, seen = layout_of(processor.config), set()
    scales = layout.quantizer.scales
    for seed in range(30):
        model, decoder, prompt, parts, bits = free_answer(processor, seed, steps)
        whole = [prompt]
        for kind, value in parts:
            if kind == "text":
                whole.append(Tokens("text", "target", ids=value.numpy().astype(np.int32)))
            elif kind == "audio":
                whole.append(Tokens("audio", "target", codes=value.numpy().astype(np.int16)))
            else:
                frames = [[bits.pop(0)[0].unflatten(0, grid) for grid in scales] for _ in range(len(value))]
                codes = layout.quantizer.replay([torch.stack(level) for level in zip(*frames, strict=True)])
                whole.append(Tokens(kind, "target", scale_codes=codes))
        if sum(len(v) for k, v in parts if k == "text") < 6 and len(parts) < decoder.sampling.max_parts:
            continue  # ended by EOS: nothing is left to read
        seen.update(kind for kind, _ in parts)
        if seen == {"text", "image", "video", "audio"} and seed > 5:
            break
        out = decoder.step(*decoder.first_group(), "text")
        expected = model.forward_packed(collate([[build_document(whole, layout)]])).hidden_BTH[0, -1]
        assert (out.hidden[0, -1] - expected).abs().max() <= TOLERANCE
        media = processor.post_process_multimodal_output([parts], generation_mode="interleaved")[0]
        assert [kind for kind, _ in media] == [kind for kind, _ in parts]
    assert seen == {"text", "image", "video", "audio"}


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("options", [{}, {"ss_scale": "full", "video_window": 1}], ids=["first", "full"])
def test_closing_a_drawing_leaves_the_state_of_a_document_that_holds_it(kind, options):
    model = tiny_model(**options)
    layout = layout_of(model.config)
    text = random_parts("text", 1, model.config)[:1]
    opener = layout.special.bov if kind == "video" else layout.special.boi
    decoder = GroupDecoder(model, layout, sampling=Sampling(max_frames=3))
    decoder.prefill([build_document(text, layout, opener=opener)])
    scales, bits = layout.quantizer.scales, []
    choose = decoder.choose_bits
    decoder.choose_bits = lambda logits: bits.append(choose(logits)) or bits[-1]
    (total,) = decode_visual(decoder, kind == "video", close=True)
    closer = layout.special.eov if kind == "video" else layout.special.eoi
    out = decoder.step(*decoder.token_group(torch.tensor([closer])), "text")
    frames = len(total)
    by_scale = [
        torch.stack([bits[f * len(scales) + k][0].unflatten(0, scales[k]) for f in range(frames)])
        for k in range(len(scales))
    ]
    codes = layout.quantizer.replay(by_scale)
    whole = build_document([*text, Tokens(kind, "target", scale_codes=codes)], layout)
    expected = model.forward_packed(collate([[whole]])).hidden_BTH[0, -1]
    assert (out.hidden[0, -1] - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_give_the_tokens_of_plain_decoding(temperature):
    model = tiny_model(**RICH)
    layout = layout_of(model.config)
    prompts = [build_document(random_parts(n, 5, model.config)[:1], layout) for n in ("text", "image_to_text")]
    for chosen in (prompts[:1], prompts[1:], prompts) if temperature == 0.0 else (prompts[:1], prompts[1:]):
        rows = {}
        for speculative in (False, True):
            sampling = Sampling(temperature, seed=3, max_new_tokens=20, speculative=speculative)
            decoder = GroupDecoder(model, layout, sampling=sampling)
            decoder.prefill(chosen)
            rows[speculative] = decode_text(decoder)
        assert rows[True] == rows[False] and max(map(len, rows[True])) > 5


def test_right_drafts_save_steps():
    """A module that repeats the stack's own choice is accepted: two tokens a step."""
    model = tiny_model(**RICH)
    layout = layout_of(model.config)
    with torch.no_grad():  # a model that repeats one token, and a draft of the same one
        model.lm_head.weight.zero_()
        model.lm_head.weight[30] = 1.0
        model.model.norm.weight.copy_(model.model.norm.weight.abs())
    decoder = GroupDecoder(model, layout, sampling=Sampling(max_new_tokens=21, speculative=True))
    decoder.prefill([build_document([], layout)])
    (tokens,) = decode_text(decoder)
    assert len(set(tokens)) == 1 and len(tokens) == 21 and decoder.steps_taken == 11


def test_guidance_moves_from_conditional_to_extrapolated_logits(processor, model):
    assert Guidance(5.0, 3.0).value(0, 5) == 5.0 and Guidance(5.0, 3.0).value(4, 5) == 3.0
    assert Guidance(5.0, 10.0, first_frame=1.0).value(0, 4, 0, 5) == 1.0
    assert Guidance(5.0, 10.0, first_frame=1.0).value(0, 4, 4, 5) == 5.0
    inputs = processor(text=["a red circle", "a blue square and"], guidance=True)
    plain = model.generate(**inputs, generation_mode="image")
    one = model.generate(**inputs, generation_mode="image", sampling=Sampling(guidance=Guidance()))
    strong = model.generate(**inputs, generation_mode="image", sampling=Sampling(guidance=Guidance(8.0, 8.0)))
    none = model.generate(**inputs, generation_mode="image", sampling=Sampling(guidance=Guidance(0.0, 0.0)))
    assert torch.equal(plain, one) and not torch.equal(plain, strong)
    bare = processor(text=["", ""])
    assert torch.equal(none, model.generate(**bare, generation_mode="image")), "0 is the unconditional picture"
    with pytest.raises(ConfigError, match="guidance=True"):
        model.generate(**processor(text="a"), generation_mode="image", sampling=Sampling(guidance=Guidance(2.0, 2.0)))


def test_rows_of_prompts_can_be_taken_and_stacked(processor):
    chats = [messages(np.random.default_rng(2)), [{"role": "user", "content": "a"}], messages(np.random.default_rng(3))]
    batch = processor.apply_chat_template(chats)["packed"]
    parts = [select_rows(batch, [0]), select_rows(batch, [1, 2])]
    joined = stack_rows(*parts)
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(joined, name), value), name
    alone = processor.apply_chat_template(chats[1])["packed"]
    padded = stack_rows(alone, select_rows(batch, [0]))
    assert torch.equal(padded.text_ids_BT[0], batch.text_ids_BT[1])


def test_processor_and_model_travel_together(processor, model, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(again, ErnieElasticProcessor) and not any(report.values())
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    chat = messages(np.random.default_rng(4))
    ours, theirs = processor.apply_chat_template(chat), again.apply_chat_template(chat)
    for name in ("input_ids", "attention_mask", "position_ids", "mm_token_type_ids"):
        assert torch.equal(ours[name], theirs[name])


def test_a_compressed_directory_brings_its_processor(processor, model, tmp_path):
    save_model(model, tmp_path / "dense")
    processor.save_pretrained(tmp_path / "dense")
    compress_directory(tmp_path / "dense", tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    again = AutoProcessor.from_pretrained(tmp_path / "small")
    prompt = again.apply_chat_template(messages(np.random.default_rng(5)))
    drawn = loaded.generate(**prompt, generation_mode="image")
    (picture,) = again.post_process_multimodal_output(drawn, generation_mode="image")
    assert picture.shape == (16, 16, 3) and picture.dtype == np.uint8


def test_bad_prompts_say_what_is_wrong(processor, model):
    with pytest.raises(DataError, match="stands for a medium"):
        processor.apply_chat_template([{"role": "user", "content": "look: <|image|>"}])
    with pytest.raises(DataError, match=r"more <\|image\|> than"):
        processor(text="<|image|>")
    with pytest.raises(DataError, match="without a placeholder"):
        processor(text="a", images=[np.zeros((16, 16, 3), np.uint8)])
    with pytest.raises(DataError, match="not one of text, image"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "smell", "smell": 1}]}])
    with pytest.raises(ConfigError, match="not one of text, image"):
        model.generate(**processor(text="a"), generation_mode="smell")
    with pytest.raises(ConfigError, match="needs a prompt of the processor"):
        model.generate(torch.tensor([[1]]), generation_mode="image")


def test_a_sound_that_cannot_be_written_is_said(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot write .*a.wav: .*; choose another --out"):
        write_media(np.zeros(10, np.float32), tmp_path / "missing" / "a.wav", 16000)
