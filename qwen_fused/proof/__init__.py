"""How `qwen_fused.prove` works inside: docs/proof.md says which file judges what."""
