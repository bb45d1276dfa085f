// Asks a model for a completion and reads its answer while it is generated: server-sent events of OpenAI's API.

import { ask, said } from "./live.js";

/** Yields the chunks of a streamed completion. Throws an Error with the server's words; `signal` ends the request. */
export async function* completion(url, body, signal) {
  const options = { stream: true, stream_options: { include_usage: true } };
  const answer = await ask("POST", url, { ...body, ...options }, signal);
  for await (const data of events(answer.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(said(chunk));
    yield chunk;
  }
  throw new Error("The answer was cut off.");
}

/** Yields the data of the events in a stream of bytes. */
async function* events(bytes) {
  const reader = bytes.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch(() => ({ done: true }));
      if (done) return;
      const whole = (rest + value).split(/\r?\n\r?\n/);
      rest = whole.pop();
      for (const event of whole) if (event.startsWith("data:")) yield event.slice(5).trim();
    }
  } finally {
    reader.cancel().catch(() => {}); // an answer that is read no further would keep its connection
  }
}
