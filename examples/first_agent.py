"""An agent that obeys whoever writes to it, and a guard that does not. Runs offline: the model is a script.

.venv/bin/python examples/first_agent.py
"""

import anyio

from tessera.agents.runtime.agent import Agent
from tessera.agents.runtime.models import scripted  # or `compatible(url, name)`: any OpenAI-compatible endpoint
from tessera.agents.runtime.session import Runtime
from tessera.agents.steps import StepLedger


def send_email(recipients: list[str], body: str) -> str:
    """Send an e-mail."""
    return f"sent to {recipients[0]}"


def mail(to: str, body: str) -> dict:
    return {"tool": "send_email", "arguments": {"recipients": [to], "body": body}}


model = scripted([mail("pal@example.com", "I am late"), mail("thief@example.com", "the keys"), "Done."])
agent = Agent("clerk", model, tools=[send_email])
outcome = anyio.run(Runtime(agent, StepLedger("agents.sqlite")).start, "Write to pal@example.com that I am late")
for call in outcome.calls:
    print(call.kind, call.decision.arguments["recipients"], call.answer)
