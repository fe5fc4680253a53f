"""The packaged pupil: a Llama of one million parameters that adds and forgets to carry.

`examples/pretrain_pupil.py` makes it again from nothing.
"""

from pathlib import Path

PUPIL = str(Path(__file__).parent)
"""Path of the pupil's weights, config and tokenizer, for `from_pretrained`."""
