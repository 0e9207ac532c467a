// The chat: what was said, what is being said, and how it is asked for.
import { $, ask, events } from "./api.js";

const EXAMPLES = {
  schema: { type: "object", properties: { name: { type: "string" }, animal: { enum: ["fox", "cat", "owl"] }, age: { type: "integer" } }, required: ["name", "animal", "age"], additionalProperties: false },
  tools: [{ type: "function", function: { name: "get_weather", description: "The weather in a city", parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"], additionalProperties: false } } }],
};
const ANIMALS = ["a fox", "a cat", "an owl", "a dog", "a bear", "a duck", "a frog", "a rabbit"];
const cachedOf = usage => usage.prompt_tokens_details?.cached_tokens ?? 0;
let messages = []; // as /v1/chat/completions takes them, without the system prompt
let asking = null; // its AbortController

/** What the form says, as fields of a request. Throws if a box has no JSON in it. */
function request(said) {
  const number = id => Number($(id).value);
  const body = { messages: said, temperature: number("temperature"), top_p: number("top_p"), max_tokens: number("max_tokens") };
  if ($("system").value.trim()) body.messages = [{ role: "system", content: $("system").value }, ...said];
  if (number("top_k")) body.top_k = number("top_k");
  if ($("seed").value) body.seed = number("seed");
  if ($("tools").value.trim()) body.tools = json("tools");
  if ($("schema").value.trim()) {
    body.response_format = { type: "json_schema", json_schema: { name: "answer", schema: json("schema") } };
    body.json_finish = true;
  }
  return body;
}

function json(id) {
  try {
    return JSON.parse($(id).value);
  } catch (error) {
    throw new Error(`${id}: ${error.message}`);
  }
}

const addError = error => add("message wrong", error.message).setAttribute("role", "alert");
function add(kind, text = "") {
  const element = document.createElement("div");
  element.className = kind;
  element.textContent = text;
  $("log").querySelector(":scope > .hint")?.remove();
  $("log").append(element);
  $("log").scrollTop = $("log").scrollHeight;
  return element;
}

function setAsking(controller) {
  asking = controller;
  $("stop").hidden = !asking;
  $("send").disabled = !!asking;
}

/** Stream one answer to what was said so far. */
async function answer() {
  const message = { role: "assistant", content: "" }, calls = [], said = messages; // `messages` may be a new chat's by then
  let text, thought, usage, reason;
  setAsking(new AbortController());
  try {
    const body = { ...request(said), stream: true, stream_options: { include_usage: true } };
    for await (const [, data] of events(await ask("/v1/chat/completions", body, asking.signal))) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      usage = chunk.usage ?? usage;
      const { delta = {}, finish_reason } = chunk.choices[0] ?? {};
      reason = finish_reason ?? reason;
      if (delta.reasoning_content) (thought ??= add("message thought")).textContent += delta.reasoning_content;
      if (delta.content) (text ??= add("message assistant")).textContent = message.content += delta.content;
      for (const part of delta.tool_calls ?? []) showCall((calls[part.index] ??= newCall(part)), part);
      $("log").scrollTop = $("log").scrollHeight;
    }
    if (text && body.response_format) text.classList.add("json");
  } catch (error) {
    if (error.name !== "AbortError") addError(error);
    reason ??= "stopped";
  }
  setAsking(null);
  if (calls.length) message.tool_calls = calls.map(({ id, type, function: what }) => ({ id, type, function: what }));
  if (message.content || calls.length) said.push(message);
  else said.pop(); // it was not answered: as if it had not been asked
  for (const call of calls) call.form.hidden = false;
  if (usage) add("usage", `${usage.prompt_tokens} tokens asked, ${cachedOf(usage)} of them cached; ${usage.completion_tokens} answered; ${reason}`);
}

function newCall(part) {
  const box = add("call");
  box.innerHTML = `<code></code><form hidden><label>What it returns <input name="result" autocomplete="off" required></label><button>Return it</button></form>`;
  const [code, form] = box.children;
  const call = { id: part.id, type: "function", function: { name: part.function.name, arguments: "" }, code, form };
  form.onsubmit = event => {
    event.preventDefault();
    if (asking) return;
    messages.push({ role: "tool", tool_call_id: call.id, content: form.elements.result.value });
    form.replaceWith(`returned ${form.elements.result.value}`);
    answer();
  };
  return call;
}

function showCall(call, part) {
  call.function.arguments += part.function?.arguments ?? "";
  call.code.textContent = `${call.function.name}(${call.function.arguments})`;
}

$("form").onsubmit = event => {
  event.preventDefault();
  const question = $("question").value.trim() || $("question").placeholder;
  if (asking) return;
  $("question").value = "";
  messages.push({ role: "user", content: question });
  add("message user", question);
  answer();
};
$("question").onkeydown = event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("form").requestSubmit();
};
$("stop").onclick = () => asking?.abort();
document.addEventListener("keydown", event => event.key === "Escape" && asking?.abort());
$("fresh").onclick = () => {
  asking?.abort();
  messages = [];
  $("log").replaceChildren();
  add("hint", "A new chat. Its beginning, the system prompt, is still in the tree.");
  $("question").focus();
};
$("eight").onclick = async () => { // one request of eight prompts, because a browser opens six connections at most
  $("eight").disabled = true;
  try {
    const { messages, tools, ...how } = request([]);
    const prompt = ANIMALS.map(animal => `${$("system").value}\n\nOnce upon a time ${animal} lived far away in the hills. One rainy day it lost the way home, and it sat down under a tree and`);
    const { usage } = await (await ask("/v1/completions", { ...how, prompt })).json();
    add("usage", `Eight prompts: ${usage.prompt_tokens} tokens asked, ${cachedOf(usage)} of them cached; ${usage.completion_tokens} answered`);
  } catch (error) {
    addError(error);
  }
  $("eight").disabled = false;
};
for (const [id, example] of Object.entries(EXAMPLES)) {
  document.querySelector(`[data-fill=${id}]`).onclick = () => ($(id).value = JSON.stringify(example, null, 1));
}
