// The engine, live: snapshots come a few times a second while the page is seen, and each panel draws its share of them.
import { $, ask, events } from "./api.js";
import { drawPace, drawPool, drawRequests, drawSteps } from "./panels.js";
import { drawTree } from "./tree.js";

let looking = new AbortController();

function say(kind, text) {
  $("status").className = kind;
  if ($("status").textContent !== text) $("status").textContent = text;
}

const on = {
  model: m => ($("model").textContent = `${m.name} on ${m.device}, ${m.dtype}; ${m.max_running_requests} rows, ${m.max_total_tokens.toLocaleString("en")} tokens of cache`),
  snapshot(snapshot) {
    say("live", "live");
    for (const draw of [drawPace, drawTree, drawRequests, drawSteps, drawPool]) draw(snapshot);
  },
  away: ({ why }) => say("away", why),
};

async function look() {
  for (;;) {
    try {
      for await (const [name, data] of events(await ask("/debug/events", null, looking.signal))) on[name](JSON.parse(data));
    } catch (error) {
      if (error.name !== "AbortError") say("away", error.message);
    }
    await new Promise(resolve => (document.hidden ? document.addEventListener("visibilitychange", resolve, { once: true }) : setTimeout(resolve, 1000)));
  }
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) return;
  looking.abort(); // the engine takes no snapshots that nobody sees
  looking = new AbortController();
});
look();
