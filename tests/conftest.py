"""All tests run in float64: laws that hold exactly are then tested to 1e-10."""

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 2)  # for the tests of sharding
