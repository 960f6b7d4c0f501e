// Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html). EventSource cannot send a POST.

// The data of each event of a response's body. An event whose blank line never came is dropped, as the standard says.
export async function* eventData(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let halfEnd = false; // the last chunk ended in a carriage return, which the line feed of this one may belong to
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + (halfEnd ? value.replace(/^\n/, "") : value)).split(/\r\n|\n|\r/);
      halfEnd = value.endsWith("\r");
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        if (line !== "") continue;
        if (data.length) yield data.join("\n");
        data = [];
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // of a stream that failed already, it only says so again
  }
}
