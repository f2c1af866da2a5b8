"""Put token pooling into a transformer somebody else wrote, in one line, and take it out again.

    >>> import tokenpool_ext
    >>> tokenpool_ext.patch(model, num_tokens={3: 128, 7: 64})      # 128 patch tokens after block 3, 64 after block 7
    >>> with tokenpool_ext.vit.record(model) as r:                  # which pooled token stands for which image patch
    ...     output = model(images)
    >>> tokenpool_ext.unpatch(model)                                # bit-equal to the model before

The blocks are found by structure and proven by permuting their tokens (``finding.py``, ``probing.py``); their own
``forward`` runs on fewer tokens (``pooled.py``), watched by a tap on the attention product (``tap.py``).
"""

from .learn import learn_schedule
from .patching import patch, patched_blocks, supported, unpatch
from .recording import Record, record, tokens_per_layer
from .search import search_schedule

__all__ = [
    "Record",
    "learn_schedule",
    "patch",
    "patched_blocks",
    "record",
    "search_schedule",
    "supported",
    "tokens_per_layer",
    "unpatch",
]
