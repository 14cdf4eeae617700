"""One thread a process, said before torch is loaded, and no pool of processes that compile.

Two workers that each spin two threads on two cores wait for each other more than they work, and a process that is
forked while OpenMP has threads, as a DataLoader does it, may hang.
"""

import os

os.environ["OMP_NUM_THREADS"] = os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
