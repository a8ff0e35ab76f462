"""The interface of OpenAI's clients: completions, chat, embeddings, models, and the tokens of a text."""

from sera_serve.server.openai import chat, completions, embeddings, models, tokens

ROUTERS = (completions.router, chat.router, embeddings.router, models.router, tokens.router)

__all__ = ["ROUTERS"]
