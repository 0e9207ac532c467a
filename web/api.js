// What the page asks of the server: with the key, once somebody has typed it, and as a stream of events.
export const $ = id => document.getElementById(id);
let typing = null; // while the dialog is open

/** A response that is ok; POST if there is a body. Throws what the server says, as one line. */
export async function ask(path, body, signal) {
  for (;;) {
    const key = sessionStorage.getItem("key");
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    if (body) headers["Content-Type"] = "application/json";
    const response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
    if (response.ok) return response;
    if (response.status !== 401) throw new Error((await response.json()).error.message);
    if (sessionStorage.getItem("key") === key) await (typing ??= askForKey());
  }
}

async function askForKey() {
  $("key-dialog").showModal();
  await new Promise(resolve => ($("key-dialog").onclose = resolve));
  sessionStorage.setItem("key", $("key").value);
  typing = null;
}

/** The server-sent events of a response, as [name, data]. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const field = name => part.split("\n").find(line => line.startsWith(`${name}: `))?.slice(name.length + 2);
      yield [field("event"), field("data")];
    }
  }
}
