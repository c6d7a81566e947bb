"""What a chat model's text means: reasoning, content and tool calls."""
