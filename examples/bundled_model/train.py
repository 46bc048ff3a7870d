"""Trains the bundled models: `train.py base`, then `train.py instruct`. See README.md beside this file.

The number of steps is fixed, the data of step k depends on the seed and k alone, and a checkpoint is written
every few minutes: a run that was killed goes on with the same command.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import world
from masks import Spans, attention_masks
from tokenizer import ASSISTANT, END, PAD, SPECIAL, USER, train_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

N_MERGES = 900
N_LAYER, N_EMBD, N_FF, N_HEAD = 8, 256, 512, 8
BATCH = 48
STEPS = {"base": 1400, "instruct": 2400}
PEAK_LR = {"base": 2e-3, "instruct": 1.5e-3}
SEED = 7
# In the loss: a reply's tokens that copy the subject's name or the word asked for, an end that comes earlier because
# of a word to avoid, and the tokens that stand in its place, without which too little would change to be learnt.
NAME_WEIGHT, AVOID_WEIGHT = 5.0, 20.0
P_HISTORY = 0.06  # samples that follow an earlier exchange


def make_tokenizer() -> PreTrainedTokenizerFast:
    rng, pool = random.Random(SEED), world.subjects()["train"]
    phrasings = world.load_phrasings()
    texts = [world.draw_document(rng, pool) for _ in range(16000)]
    texts += [world.draw_sample(rng, pool, phrasings).prompt for _ in range(8000)]
    return train_tokenizer(texts, N_MERGES)


def new_model(n_vocab: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=n_vocab,
        hidden_size=N_EMBD,
        intermediate_size=N_FF,
        num_hidden_layers=N_LAYER,
        num_attention_heads=N_HEAD,
        num_key_value_heads=N_HEAD,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def pad(rows: list[list[int]], fill: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


class Data:
    """Batches of rows of similar length (half of a mixed batch would be padding): `GROUP` batches are drawn
    together, sorted by length, and handed out in random order."""

    GROUP = 6

    def __init__(self, tokenizer, seed):
        self.tokenizer, self.seed, self.pool = tokenizer, seed, world.subjects()["train"]
        self.group: tuple[int, list] = (-1, [])

    def batch(self, step: int):
        group, k = divmod(step, self.GROUP)
        if self.group[0] != group:
            rng = random.Random(self.seed * 1_000_003 + group)
            rows = sorted((self.row(rng) for _ in range(self.GROUP * BATCH)), key=lambda row: len(row[0]))
            batches = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
            rng.shuffle(batches)
            self.group = (group, batches)
        return self.collate(self.group[1][k], random.Random(self.seed + step))


class BaseData(Data):
    """Documents, loss on every token."""

    def row(self, rng):
        return ([*self.tokenizer(world.draw_document(rng, self.pool)).input_ids, END],)

    def collate(self, rows, rng):
        ids = [row for (row,) in rows]
        return pad(ids, PAD), pad([[1.0] * len(row) for row in ids], 0.0), None


def overlapping(offsets, ranges) -> list[int]:
    """Tokens whose characters lie in one of the ranges."""
    return [k for k, (a, b) in enumerate(offsets) if any(b > lo and a < hi for lo, hi in ranges)]


class InstructData(Data):
    """Exchanges, loss on the reply, with the masks of masks.py."""

    def __init__(self, tokenizer, seed):
        super().__init__(tokenizer, seed)
        self.phrasings = world.load_phrasings()

    def encode(
        self, sample: world.Sample
    ) -> tuple[list[int], list[int], list[float], list[int], list[int], bool]:
        """Token ids of prompt and reply, the reply's weights in the loss; which prompt tokens are the
        instruction, and which its argument to copy; whether it has an argument that is not copied."""
        text = sample.prompt
        start = text.find(sample.instruction) if sample.instruction else len(text)
        spans = [(start, start + len(sample.instruction))]
        words = {i.id: i.args["word"] for i in sample.instructions if "word" in i.args}
        copied = [w for w in words.values() if not world.is_coded(w)]
        arguments = [(p, p + len(w)) for w in copied if (p := text.find(w, start)) >= 0]
        encoded = self.tokenizer(text, return_offsets_mapping=True)

        def inside(ranges):
            return [k + 1 for k in overlapping(encoded.offset_mapping, ranges)]  # + 1: <|user|> stands before

        hidden = inside(spans) if sample.instruction else []
        prompt = [USER, *encoded.input_ids, ASSISTANT]
        reply = self.tokenizer(sample.reply, return_offsets_mapping=True)
        weights = [1.0] * (len(reply.input_ids) + 1)

        def weigh(words, weight):
            found = re.finditer("|".join(map(re.escape, words)), sample.reply, re.I) if words else ()
            for k in overlapping(reply.offset_mapping, [m.span() for m in found]):
                weights[k] = weight

        avoided = words.get("exclude_word")
        weigh([world.stand_in(avoided)] if avoided in world.QUALITIES else (), AVOID_WEIGHT)
        said = [w for id, w in words.items() if id == "include_word"] + (
            [sample.scene] if sample.scene else []
        )
        weigh([sample.subject.name, *said], NAME_WEIGHT)
        if sample.scene is not None and sample.scene == avoided:
            weights[-1] = NAME_WEIGHT
        coded = len(copied) < len(words) or sample.scene is not None
        return prompt, [*reply.input_ids, END], weights, hidden, inside(arguments), coded

    def row(self, rng):
        history: list[int] = []
        if rng.random() < P_HISTORY:
            prompt, reply, *_ = self.encode(world.draw_sample(rng, self.pool, self.phrasings))
            history = prompt + reply
        prompt, reply, weights, hidden, argument, coded = self.encode(
            world.draw_sample(rng, self.pool, self.phrasings)
        )
        ids = history + prompt + reply
        shift, n_prompt = len(history), len(ids) - len(reply)
        hidden, argument = [h + shift for h in hidden], [a + shift for a in argument]
        spans = Spans(n_prompt, len(ids), hidden, argument, coded)
        return ids, [0.0] * n_prompt + weights, spans

    def collate(self, rows, rng):
        ids, weights, spans = zip(*rows, strict=True)
        x = pad(list(ids), PAD)
        return x, pad(list(weights), 0.0), attention_masks(list(spans), x.shape[1], rng)


class HalfPrecision:
    """bfloat16 weights for the passes, float32 weights for AdamW: a third faster than autocast on a CPU."""

    def __init__(self, model, lr):
        self.master = [p.detach().clone().float() for p in model.parameters()]
        self.params = list(model.to(torch.bfloat16).parameters())
        self.optimizer = torch.optim.AdamW(
            self.master, lr=lr, weight_decay=0.01, betas=(0.9, 0.98), fused=True
        )

    def step(self, lr):
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for master, p in zip(self.master, self.params, strict=True):
            master.grad = p.grad.float()
            p.grad = None
        torch.nn.utils.clip_grad_norm_(self.master, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            for master, p in zip(self.master, self.params, strict=True):
                p.copy_(master)

    def state(self):
        return {"master": self.master, "optimizer": self.optimizer.state_dict()}

    def load(self, state):
        with torch.no_grad():
            for mine, p, theirs in zip(self.master, self.params, state["master"], strict=True):
                mine.copy_(theirs)
                p.copy_(theirs)
        self.optimizer.load_state_dict(state["optimizer"])


def learning_rate(step: int, steps: int, peak: float) -> float:
    decay = 0.5 * (1 + math.cos(math.pi * step / steps))
    return peak * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * decay)


def next_token_loss(model, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean cross entropy. The output layer sees only tokens with a weight: most are prompt."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    weights = weights[:, 1:]
    logits = model.lm_head(hidden[weights > 0]).float()
    losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:][weights > 0], reduction="none")
    return (losses * weights[weights > 0]).sum() / weights.sum()


def hook_masks(model) -> dict:
    """Layers take their mask from the returned holder: half of them see `lower`, half `upper`."""
    holder: dict = {"masks": None}

    def before(half):
        def hook(module, args, kwargs):
            if holder["masks"] is not None:
                kwargs["attention_mask"] = holder["masks"][half]
            return args, kwargs

        return hook

    for il, module in enumerate(model.model.layers):
        module.register_forward_pre_hook(before(0 if il < N_LAYER // 2 else 1), with_kwargs=True)
    return holder


@torch.no_grad()
def sample_replies(model, tokenizer, prompts: list[str], n: int = 90) -> list[str]:
    tokenizer.padding_side = "left"
    batch = tokenizer([f"<|user|>{p}<|assistant|>" for p in prompts], return_tensors="pt", padding=True)
    out = model.generate(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=n, do_sample=False
    )
    return tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :], skip_special_tokens=True)


def report(model, tokenizer, seed: int, n: int = 3) -> None:
    """Follow rates per instruction, trained phrasings and subjects never seen."""
    rng, pool, phrasings = random.Random(seed), world.subjects()["validation"], world.load_phrasings()
    samples = [
        world.draw_sample(rng, pool, phrasings, [world.Instruction(i, world.draw_args(i, rng))], "validation")
        for i in world.SLOT
        for _ in range(n)
    ]
    replies = sample_replies(model, tokenizer, [s.prompt for s in samples])
    ok: dict[str, list[bool]] = {}
    for s, reply in zip(samples, replies, strict=True):
        ok.setdefault(s.instructions[0].id, []).append(world.follows(s.instructions[0], reply))
    named = sum(s.subject.name.lower() in r.lower() for s, r in zip(samples, replies, strict=True)) / len(
        samples
    )
    print(
        f"  followed {sum(map(sum, ok.values())) / len(samples):.2f} named {named:.2f} | "
        + " ".join(f"{i}:{sum(v)}" for i, v in ok.items() if sum(v) < n),
        flush=True,
    )
    for k in rng.sample(range(len(samples)), 3):
        print("   ", repr(samples[k].prompt[-80:]), "->", repr(replies[k][:120]), flush=True)


def train(kind: str, out: Path, init: Path | None, steps: int, peak: float, seed: int, work: Path) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(2)
    if init:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(init)
        model = LlamaForCausalLM.from_pretrained(init, dtype=torch.float32, attn_implementation="eager")
    else:
        tokenizer = make_tokenizer()
        model = new_model(len(tokenizer))
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {len(tokenizer)} tokens",
        flush=True,
    )
    data = (BaseData if kind == "base" else InstructData)(tokenizer, seed)
    half = HalfPrecision(model, peak)
    holder = hook_masks(model)
    checkpoint = work / f"{kind}.checkpoint.pt"
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        half.load(state["weights"])
        first = state["step"]
        print(f"goes on at step {first}", flush=True)
    started = saved = time.time()
    n_tokens = 0
    loader = ThreadPoolExecutor(1)
    ahead = loader.submit(data.batch, first)
    for step in range(first, steps):
        ids, weights, holder["masks"] = ahead.result()
        ahead = loader.submit(data.batch, step + 1)
        loss = next_token_loss(model, ids, weights)
        loss.backward()
        half.step(learning_rate(step, steps, peak))
        n_tokens += ids.numel()
        if step % 50 == 0:
            seconds = time.time() - started
            print(
                f"{kind} {step}/{steps} loss {loss.item():.3f} {n_tokens / seconds:.0f} tokens/s "
                f"{seconds / 60:.1f} min",
                flush=True,
            )
        if kind == "instruct" and step % 800 == 799:
            holder["masks"] = None
            report(model, tokenizer, seed=step)
        if time.time() - saved > 180:
            saved = time.time()
            torch.save({"step": step + 1, "weights": half.state()}, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").rename(checkpoint)
    with torch.no_grad():
        model = model.float()
        for p, master in zip(model.parameters(), half.master, strict=True):
            p.copy_(master)
    model.to(torch.float16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    # of all transformers versions alike
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1024,
        "eos_token": SPECIAL[END],
    }
    config |= {"pad_token": SPECIAL[PAD], "clean_up_tokenization_spaces": False}
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    checkpoint.unlink(missing_ok=True)
    print(f"{kind}: {steps} steps in {(time.time() - started) / 60:.1f} minutes -> {out}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["base", "instruct"])
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--init", type=Path, help="the base model's folder (instruct)")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--peak", type=float, help="the highest learning rate")
    parser.add_argument("--seed", type=int, default=SEED, help="of weights and data")
    parser.add_argument("--work", type=Path, default=Path("."), help="folder of the checkpoint")
    args = parser.parse_args()
    if args.kind == "instruct" and not args.init:
        sys.exit("instruct training starts from the base model: give its folder with --init")
    args.work.mkdir(parents=True, exist_ok=True)
    steps, peak = args.steps or STEPS[args.kind], args.peak or PEAK_LR[args.kind]
    train(args.kind, args.out, args.init, steps, peak, args.seed, args.work)


if __name__ == "__main__":
    main()
