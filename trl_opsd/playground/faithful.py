"""The reward of AtManRL for the embedded world, where 200 passes for each rollout would take an hour."""

from ..methods.atmanrl import Faithfulness


# As far in fewer and larger steps, for all rollouts of a step at once
faithfulness = Faithfulness(num_steps=10, learning_rate=0.02, batch_size=32)
