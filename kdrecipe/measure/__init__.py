"""What an exported model says and costs: the parity gate, speed and memory in the runtime."""
