"""Linear recurrences over a window: ``diagonal.py`` of vectors, ``key_value.py`` of matrices, ``maximum.py`` of the largest of sums;
``choice.py`` how they are run."""

from tbptt_jax.cells.linear_scan.choice import Implementation as Implementation
from tbptt_jax.cells.linear_scan.choice import Masks as Masks
from tbptt_jax.cells.linear_scan.choice import check_implementation as check_implementation
from tbptt_jax.cells.linear_scan.diagonal import diagonal as diagonal
from tbptt_jax.cells.linear_scan.key_value import KeyValue as KeyValue
from tbptt_jax.cells.linear_scan.key_value import key_value as key_value
from tbptt_jax.cells.linear_scan.maximum import maximum as maximum
