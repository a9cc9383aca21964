"""How `qwen_fused.proof.prove` works inside: docs/proof.md says which file judges what."""
