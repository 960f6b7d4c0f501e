// A conversation with the model, over /v1/chat/completions, or /v1/completions where it has no chat template.

import { ServerError, Unreachable, getJson, reached, request } from "./server.js";
import { eventData } from "./sse.js";

export class Conversation {
  #turns = []; // what the model is shown: a turn that failed is left out
  #model = null;
  #plain = false;

  // Yields, in the order in which they come: { sent: true } as a request goes out, { plain: true } where it has to be
  // another one, without a chat template, { text }, { finish } with the reason, { usage } with the counts of tokens.
  // sampling: fields of the request.
  async *ask(prompt, sampling, signal) {
    this.#model ??= (await getJson("v1/models", { signal })).data[0].id;
    const turns = [...this.#turns, { role: "user", content: prompt }];
    let answer = "";
    try {
      for await (const chunk of this.#chunks(turns, sampling, signal)) {
        if (chunk.sent || chunk.plain) yield chunk;
        for (const choice of chunk.choices ?? []) {
          const text = choice.delta?.content ?? choice.text ?? "";
          answer += text;
          if (text) yield { text };
          if (choice.finish_reason) yield { finish: choice.finish_reason };
        }
        if (chunk.usage) yield { usage: chunk.usage };
      }
    } catch (error) {
      if (signal.aborted && answer) this.#keep(turns, answer);
      throw error;
    }
    this.#keep(turns, answer);
  }

  #keep(turns, answer) {
    this.#turns = [...turns, { role: "assistant", content: answer }];
  }

  async *#chunks(turns, sampling, signal) {
    if (!this.#plain) {
      try {
        yield* this.#stream("v1/chat/completions", { messages: turns, ...sampling }, signal);
        return;
      } catch (error) {
        if (!(error instanceof ServerError && error.status === 400 && /no chat template/i.test(error.message))) throw error;
        this.#plain = true;
        yield { plain: true };
      }
    }
    const prompt = turns.map((turn) => turn.content).join("\n");
    yield* this.#stream("v1/completions", { prompt, ...sampling }, signal);
  }

  async *#stream(path, fields, signal) {
    const body = { model: this.#model, stream: true, stream_options: { include_usage: true }, ...fields };
    yield { sent: true };
    const response = await request(path, { signal, body });
    const events = eventData(response.body);
    for (;;) {
      const { value, done } = await reached(events.next(), signal);
      if (done) throw new Unreachable("the answer broke off");
      if (value === "[DONE]") return;
      const chunk = JSON.parse(value);
      if (chunk.error) throw new ServerError(response.status, chunk.error.message);
      yield chunk;
    }
  }
}
