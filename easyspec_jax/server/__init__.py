"""OpenAI's protocol over HTTP, and a chat page; the extra `serve` has what it needs."""
