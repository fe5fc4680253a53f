"""A byte-level tokenizer with special tokens and chat templates, in the manner of instruct models."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<eos>", "<pad>", "<bos>", "<|im_start|>", "<|im_end|>"]
EOS, PAD, BOS, START, END = range(5)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPIDER = [{"role": "user", "content": "How many legs has a spider?"}]
SPIDER_TEXT = "<|im_start|>user\nHow many legs has a spider?<|im_end|>\n<|im_start|>assistant\n"


def make_chat_tokenizer(eos="<eos>", template=CHATML, post=None, special=SPECIAL):
    """The first ids are `special`, then come the 256 bytes; `post` is a post-processor such as `"<bos> $A"`."""
    vocab = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True) for token in special])
    if post:
        inner.post_processor = processors.TemplateProcessing(single=post, special_tokens=[(s, vocab[s]) for s in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos, pad_token="<pad>", bos_token="<bos>")
    tokenizer.chat_template = template
    return tokenizer


def ids_of(text, special=SPECIAL):
    """The token ids of a text by hand: special tokens by their place in `special`, else one id a byte."""
    ids, alphabet = [], sorted(pre_tokenizers.ByteLevel.alphabet())
    table = bytes_to_symbols()
    while text:
        token = next((s for s in special if text.startswith(s)), None)
        if token:
            ids.append(special.index(token))
            text = text.removeprefix(token)
        else:
            ids += [len(special) + alphabet.index(table[byte]) for byte in text[0].encode()]
            text = text[1:]
    return ids


def bytes_to_symbols():
    """GPT-2's table: printable bytes stand for themselves, the others for characters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
