"""Text around the engine: prompts, answers and the chat session."""
