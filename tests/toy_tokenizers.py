"""Small tokenizers, trained in memory, one for each way in which a prompt and its completion meet.

`byte_bpe`, `with_bos`   byte-level BPE (GPT-2, Llama 3): letters merge across the boundary; one adds a first token
`wordpiece`              BERT's: the prompt alone ends with [SEP], so the completion starts before the prompt's end
`metaspace`              Unigram with "▁" for spaces (T5, Llama 2): a prompt's last space belongs to the next word
`chat`                   byte-level BPE with a chat template, by name in `CHAT_TEMPLATES`
"""

from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

EOS = "<|end|>"

_CORPUS = [
    "Human: What colour is the sky today? Assistant: The sky is blue, and so is the sea.",
    "Human: how do I write an unhappy, uncommon, international letter?\n\nAssistant: With understanding.",
    "The rain in Spain stays mainly in the plain; the weather is the weather, whether you like it or not.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))\n",
    "user assistant system tool naïve café — “quoted” 你好 мир 🙂",
] * 3

_TURNS = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
CHAT_TEMPLATES = {
    "plain": _TURNS + "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    # As Gemma 4: the generation prompt ends with an empty thought that the finished conversation does not have.
    "thought": _TURNS + "{% if add_generation_prompt %}<|assistant|>\n<think>\n\n</think>\n{% endif %}",
    # Merges across the boundary: nothing separates the role from the content.
    "no boundary": "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}",
    "tools": "{% if tools %}<|system|>{{ tools | tojson }}{{ style }}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
    "{% if m.tool_calls is defined %}{{ m.tool_calls | tojson }}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{{ '<think></think>' if enable_thinking is false }}{% endif %}",
    "alternating": "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
    "deaf": "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
}


def byte_bpe(**arguments: object) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=_byte_bpe(), **{"eos_token": EOS, **arguments})


def with_bos() -> PreTrainedTokenizerFast:
    backend = _byte_bpe()
    backend.add_special_tokens(["<s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=EOS)


def wordpiece() -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(_wordpiece())
    ends = [(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[SEP]", unk_token="[UNK]")


def metaspace() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_metaspace()), eos_token="</s>")


def chat(template: str = "plain") -> PreTrainedTokenizerFast:
    tokenizer = byte_bpe()
    tokenizer.chat_template = CHAT_TEMPLATES[template]
    return tokenizer


TEXT_TOKENIZERS = {"byte_bpe": byte_bpe, "with_bos": with_bos, "wordpiece": wordpiece, "metaspace": metaspace}


def _byte_bpe() -> Tokenizer:
    return Tokenizer.from_str(_byte_bpe_json())


@cache
def _byte_bpe_json() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[EOS, "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    return backend.to_str()


@cache
def _wordpiece() -> str:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    backend.train_from_iterator(_CORPUS, trainer)
    return backend.to_str()


@cache
def _metaspace() -> str:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(_CORPUS, trainer)
    return backend.to_str()
