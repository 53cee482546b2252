// Answers to agents' questions. A yes is signed by the wallet in this browser; this page never sees a key.
"use strict";

(() => {
  const told = document.getElementById("told");

  function tell(text) {
    told.textContent = text;
  }

  async function post(card, answer, body) {
    const path = `/api/questions/${encodeURIComponent(card.dataset.agent)}/${card.dataset.call}/${answer}`;
    const reply = await fetch(path, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(body),
    });
    const value = await reply.json();
    if (!reply.ok) throw new Error(value.error ? value.error.message : `status ${reply.status}`);
    return value;
  }

  async function sign(card) {
    if (!window.ethereum) {
      throw new Error("No wallet in this browser: allow it with `tessera agent approve`, where the approver's key is.");
    }
    const accounts = await window.ethereum.request({ method: "eth_requestAccounts" });
    const wanted = card.dataset.approver.toLowerCase();
    if (!accounts.some((account) => account.toLowerCase() === wanted)) {
      throw new Error(`The wallet does not hold ${card.dataset.approver}.`);
    }
    return window.ethereum.request({
      method: "eth_signTypedData_v4",
      params: [card.dataset.approver, card.dataset.typed],
    });
  }

  async function answer(card, kind) {
    const buttons = card.querySelectorAll("button");
    for (const button of buttons) button.disabled = true;
    try {
      const body = kind === "deny" ? {} : { signature: await sign(card), expires_at: Number(card.dataset.expires) };
      await post(card, kind, body);
      tell(kind === "deny" ? "Denied." : "Allowed, once.");
      card.remove();
    } catch (error) {
      tell(error.message || String(error));
      for (const button of buttons) button.disabled = false;
    }
  }

  for (const card of document.querySelectorAll(".question")) {
    card.addEventListener("click", (event) => {
      const kind = event.target.dataset && event.target.dataset.answer;
      if (kind) answer(card, kind);
    });
  }

  // A new question, or one that somebody else has answered, changes the list: then the page is read anew.
  const shown = () => [...document.querySelectorAll(".question")].map((card) => card.dataset.call).sort().join(" ");
  let busy = false;
  document.addEventListener("focusin", () => { busy = document.activeElement !== document.body; });
  document.addEventListener("focusout", () => { busy = false; });
  setInterval(async () => {
    if (busy) return;
    try {
      const reply = await fetch("/api/questions", { cache: "no-store" });
      const calls = (await reply.json()).map((one) => one.call).sort().join(" ");
      if (calls !== shown()) location.reload();
    } catch {
      tell("The page that asks is gone: is `tessera agent page` still running?");
    }
  }, 3000);
})();
