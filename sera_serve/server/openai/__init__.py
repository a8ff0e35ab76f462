"""The interface of OpenAI's clients: completions, chat, responses, embeddings, models, files, fine-tuning, tokens."""

from sera_serve.server.openai import chat, completions, embeddings, files, fine_tuning, models, responses, tokens

ROUTERS = (
    completions.router,
    chat.router,
    responses.router,
    embeddings.router,
    models.router,
    files.router,
    fine_tuning.router,
    tokens.router,
)

__all__ = ["ROUTERS"]
