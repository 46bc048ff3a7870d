"""The bundled model's tokenizer: byte-level BPE whose merges are symmetric in case.

Plain BPE cuts `Velmora`, `velmora` and `VELMORA` in three different ways, so a small model would have to
learn the spelling of every word three times before it could write in capitals. Here the merges are learnt on
lowercase text and then repeated for the capitalised and the upper-case form, rank by rank: the three forms
of a word are cut at the same places, and changing case is a map from token to token.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
PAD, USER, ASSISTANT, END = range(4)
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{ '<|assistant|>' + message['content'] + '<|end|>' }}"
    "{%- else -%}{{ '<|user|>' + message['content'] }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)
_SPACE = "Ġ"  # the byte-level alphabet's letter for a space


def _capitalised(piece: str) -> str:
    head = piece[:2] if piece.startswith(_SPACE) else piece[:1]
    return head.upper() + piece[len(head) :]


def _case_forms(left: str, right: str) -> list[tuple[str, str]]:
    """The merge itself, its capitalised form and its upper-case form (ASCII letters only: the other
    characters of the byte-level alphabet are bytes, and bytes have no case)."""
    if not (left + right).replace(_SPACE, "").isascii():
        return [(left, right)]
    capital = (left, _capitalised(right)) if left == _SPACE else (_capitalised(left), right)
    return list(dict.fromkeys([(left, right), capital, (left.upper(), right.upper())]))


def train_tokenizer(texts: list[str], n_merges: int) -> PreTrainedTokenizerFast:
    """`n_merges` merges learnt on the lowercase texts, each with its case forms."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        (t.lower() for t in texts),
        trainers.BpeTrainer(vocab_size=256 + n_merges, initial_alphabet=alphabet, show_progress=False),
    )
    import json

    learnt = [tuple(m) for m in json.loads(learner.to_str())["model"]["merges"]]

    vocab = {token: i for i, token in enumerate(SPECIAL + alphabet)}
    merges: dict[tuple[str, str], None] = {}
    for left, right in learnt:
        for form in _case_forms(left, right):
            if form not in merges and form[0] in vocab and form[1] in vocab:
                merges[form] = None
                vocab.setdefault("".join(form), len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[PAD],
        eos_token=SPECIAL[END],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
