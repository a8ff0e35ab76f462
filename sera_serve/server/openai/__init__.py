"""The interface of OpenAI's clients: completions, chat, responses, embeddings, models, and the tokens of a text."""

from sera_serve.server.openai import chat, completions, embeddings, models, responses, tokens

ROUTERS = (completions.router, chat.router, responses.router, embeddings.router, models.router, tokens.router)

__all__ = ["ROUTERS"]
