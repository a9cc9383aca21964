"""What plans an answer under a prompt: agent, policy, objective, and the model they make with Qwen."""
