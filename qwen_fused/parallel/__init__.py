"""Several processes that train as one, and a Qwen sharded over them."""
