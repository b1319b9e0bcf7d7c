"""All tests run in float64: laws that hold exactly are then tested to 1e-10."""

import os

# The tests compile much more than they compute.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=1".strip()

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 2)  # for the tests of sharding
