"""Other libraries' chatter kept off the screen, while errors stay what they are."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

CHATTY = ("onnx_ir", "onnxscript", "torch.onnx", "torch.export", "transformers")


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block, exporters, loaders and trainers print no progress, no warnings and no bars.

    Standard output is held back too: torch.onnx prints its progress there, and it belongs to results.
    """
    import datasets
    from transformers.utils import logging as transformers_logging

    levels = {name: logging.getLogger(name).level for name in CHATTY}
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers_bars = transformers_logging.is_progress_bar_enabled()
    datasets_bars = not datasets.are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if transformers_bars:
            transformers_logging.enable_progress_bar()
        if datasets_bars:
            datasets.enable_progress_bars()
