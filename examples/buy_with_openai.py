"""Ask the model through OpenAI's own client; x402's transport pays for each answer. Run it while `tessera up` is up.

.venv/bin/python examples/buy_with_openai.py [STATE_DIR]
"""

import asyncio
import json
import sys
from pathlib import Path

import httpx
from eth_account import Account
from openai import AsyncOpenAI
from x402 import x402Client
from x402.http.clients.httpx import x402AsyncTransport
from x402.mechanisms.evm.exact import register_exact_evm_client
from x402.mechanisms.evm.signers import EthAccountSigner

DEFAULT_STATE = Path.home() / ".local/state/tessera/up"


async def main(state: Path) -> None:
    gateway = json.loads((state / "up.json").read_text())["gateway"]
    buyer = Account.from_key((state / "buyer.key").read_text().strip())  # has test dollars

    async with httpx.AsyncClient() as http:  # an unpaid request is answered with the offer
        model = (await http.get(f"{gateway}/models")).json()["data"][0]["id"]
        answer = await http.post(f"{gateway}/completions", json={"model": model, "prompt": "?"})
        offer = answer.json()["accepts"][0]

    wallet = x402Client()  # pays nothing but this coin, and no more than this for a request
    allowed = {"network": offer["network"], "asset": offer["asset"], "max_amount_per_payment": offer["amount"]}
    wallet.set_spend_controls({"allowed_assets": [allowed]})
    register_exact_evm_client(wallet, EthAccountSigner(buyer))

    http = httpx.AsyncClient(transport=x402AsyncTransport(wallet), timeout=60)
    async with AsyncOpenAI(base_url=gateway, api_key="unused", http_client=http) as client:
        stream = await client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "def read(self):"}], max_tokens=48, stream=True
        )
        async for chunk in stream:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print(f"\npaid {offer['amount']} units of {offer['asset']} to {offer['payTo']}")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_STATE))
