"""What `benchmarks/faults.py` is made of: commands run in forked children, what happens to them, who judges it."""

import os

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
# Before torch is there: one thread, so that the process can be forked and sums are rounded alike.
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
