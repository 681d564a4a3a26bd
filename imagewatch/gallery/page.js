"use strict";
// Text that others wrote (prompts, names, messages) becomes text and attributes here, never markup.
const $ = (selector) => document.querySelector(selector);
const data = JSON.parse($("#data").textContent);
const jobs = data.shown.jobs;

function make(tag, attributes, ...children) {
  const drawing = ["svg", "g", "rect", "title"].includes(tag);
  const element = drawing ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== undefined && value !== "") element.setAttribute(name, value);
  element.append(...children.filter((child) => child));
  return element;
}

const days = new Intl.DateTimeFormat(undefined, { weekday: "short", day: "numeric", month: "long", year: "numeric", timeZone: "UTC" });
const months = new Intl.DateTimeFormat(undefined, { month: "long", year: "numeric", timeZone: "UTC" });
const short = new Intl.DateTimeFormat(undefined, { day: "numeric", month: "short", hour: "numeric", minute: "2-digit" });
const shortDays = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeZone: "UTC" });
const moments = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });
const number = new Intl.NumberFormat(undefined, { maximumFractionDigits: 2 }).format;
const plural = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;
const size = (bytes) => (bytes < 1e6 ? `${number(Math.ceil(bytes / 1e3))} kB` : `${number(Math.round(bytes / 1e5) / 10)} MB`);
const pixels = (image) => (image?.width ? `${image.width} × ${image.height}` : "");
const present = (...parts) => parts.filter(Boolean);
const sum = (list, value) => list.reduce((total, job) => total + value(job), 0);
const credits = (job) => job.credits ?? 0;
const imageCount = (job) => (job.completed ? job.images.length : 0);
const credentials = "content credentials (C2PA) in the file; not checked";
const charged = { yes: "charged", unknown: "may have been charged", no: "not charged" };
const cost = (job) => (job.credits == null ? charged[job.charged] ?? "" : plural(job.credits, "credit"));
const opens = (job) => (job.unreadable ? "" : job.result_file); // an unreadable result file may be anything
const verdict = (job) => present("Failed", charged[job.charged]).join(", ");

for (const job of jobs) {
  for (const name of ["images", "inputs", "problems"]) job[name] ??= [];
  for (const name of ["folder", "provider", "model", "prompt", "message", "next"]) job[name] ??= "";
  const date = new Date(job.at);
  job.day = Date.UTC(date.getFullYear(), date.getMonth(), date.getDate()) / 864e5; // by the reader's calendar
  job.month = Date.UTC(date.getFullYear(), date.getMonth()) / 864e5;
  job.path = present(job.folder, job.name).join("/");
  job.title = job.prompt || job.name;
  job.short = job.title.slice(0, 500); // for a card, which shows two lines
  job.text = [job.prompt, job.path, job.model, job.message, ...job.images.map((image) => image.name)].join("\n").toLowerCase();
}

// The current selection. It is also in the page's address, so that a reload or a link shows the same.

const fields = { q: $("#words"), outcome: $("form").elements.outcome, provider: $("#provider"), folder: $("#folder") };
let shown = jobs;

function offer(select, all, found) {
  const values = [...new Set(found)].filter(Boolean).sort();
  select.append(make("option", {}, all), ...values.map((value) => make("option", { value }, value)));
  select.options[0].value = "";
  select.hidden = values.length < 2;
}

function choose() {
  const words = fields.q.value.toLowerCase().split(/\s+/).filter(Boolean);
  const [outcome, provider, folder] = [fields.outcome.value, fields.provider.value, fields.folder.value];
  shown = jobs.filter((job) =>
    (!outcome || job.completed === (outcome === "completed")) && (!provider || job.provider === provider) &&
    (!folder || `${job.folder}/`.startsWith(`${folder}/`)) && words.every((word) => job.text.includes(word)));
  current = 0;
  summarize();
  arrange();
}

function remember() {
  const address = new URLSearchParams();
  for (const [name, field] of Object.entries(fields)) if (field.value) address.set(name, field.value);
  if (view.open) address.set("job", shown[at].result_file);
  if (view.open && part) address.set("image", part);
  history.replaceState(null, "", `#${address}`);
}

function recall() {
  const address = new URLSearchParams(location.hash.slice(1));
  for (const [name, field] of Object.entries(fields)) {
    field.value = address.get(name) ?? "";
    if (field.selectedIndex === -1) field.value = ""; // a provider or folder that the page does not have any more
  }
  choose();
  const index = shown.findIndex((job) => job.result_file === address.get("job"));
  if (index >= 0) enlarge(index, Number(address.get("image")) || 0);
  else if (view.open) leave();
}

function summarize() {
  const completed = shown.filter((job) => job.completed).length, failed = shown.length - completed;
  const open = shown.filter((job) => job.credits == null && /yes|unknown/.test(job.charged)).length;
  const totals = [[sum(shown, credits), "credits"], [sum(shown, imageCount), "images"], [completed, "completed"], [failed, "failed", failed]];
  if (open) totals.push([open, "of unknown cost", true]);
  $("#totals").replaceChildren(...totals.map(([value, name, bad]) =>
    make("div", { class: bad ? "bad" : "" }, make("dt", {}, name), make("dd", {}, number(value)))));
  $("#count").textContent = present(shown.length < jobs.length && `${number(shown.length)} of`, plural(jobs.length, "job")).join(" ");
  $("#chart").hidden = !sum(shown, credits);
  if (!$("#chart").hidden) chart(shown[0].day, shown.at(-1).day);
}

/** Draw the credits of each day, or of longer periods if there are too many days for visible bars. */
function chart(newest, oldest) {
  const [step, unit] = newest - oldest <= 120 ? [1, "day"] : newest - oldest <= 840 ? [7, "week"] : [30, "30 days"];
  const count = Math.min(Math.max(Math.floor((newest - oldest) / step) + 1, 30), 400);
  const bars = Array.from({ length: count }, () => ({ credits: 0 }));
  for (const job of shown) {
    const bar = bars[count - 1 - Math.floor((newest - job.day) / step)];
    if (bar) [bar.credits, bar.job] = [bar.credits + credits(job), bar.job ?? job];
  }
  const most = Math.max(...bars.map((bar) => bar.credits));
  const name = (index) => shortDays.format((newest - (count - 1 - index) * step) * 864e5);
  const columns = bars.map((bar, index) => {
    const height = bar.credits && Math.max((bar.credits / most) * 100, 2);
    const column = make("g", {}, make("rect", { class: "hit", x: index, width: 1, height: 100 }),
      make("rect", { class: "bar", x: index + 0.12, y: 100 - height, width: 0.76, height }),
      make("title", {}, `${step > 1 ? `${unit} to ` : ""}${name(index)}: ${plural(bar.credits, "credit")}`));
    if (bar.job) column.addEventListener("click", () => reveal(shown.indexOf(bar.job), true));
    return column;
  });
  const label = `Credits per ${unit}, at most ${number(most)}`, ends = [name(0), name(count - 1)];
  $("#chart").replaceChildren(
    make("svg", { viewBox: `0 0 ${count} 100`, preserveAspectRatio: "none", role: "img", "aria-label": `${label}, ${ends.join(" to ")}` }, ...columns),
    make("figcaption", {}, ...[ends[0], label, ends[1]].map((text) => make("span", {}, text))));
}

// The list: headings of days and rows of cards, of which only those near the window exist.

const list = $("#list");
const drawn = new Map();
let rows = [], columns = 1, current = 0, frame = 0, rem = 16;

function arrange() {
  const style = getComputedStyle(document.documentElement), gap = parseFloat(style.getPropertyValue("--gap"));
  rem = parseFloat(style.fontSize);
  const width = list.clientWidth / rem;
  columns = Math.max(Math.floor((width + gap) / (13 + gap)), width > 17 ? 2 : 1);
  const height = (width - gap * (columns - 1)) / columns + parseFloat(style.getPropertyValue("--words"));
  const sizes = new Map();
  for (const job of shown) sizes.set(job.day, (sizes.get(job.day) ?? 0) + 1);
  const lines = [...sizes.values()].reduce((total, jobs) => total + Math.ceil(jobs / columns), 0);
  const span = lines > 1.6 * Math.ceil(shown.length / columns) ? "month" : "day"; // no headings over single images
  let top = 0;
  rows = [];
  for (let from = 0, to; from < shown.length; from = to) {
    for (to = from; shown[to]?.[span] === shown[from][span]; ) to += 1;
    rows.push({ top: top * rem, height: 3.5 * rem, from, to, span });
    top += 3.5;
    for (let first = from; first < to; first += columns, top += height + gap) {
      rows.push({ top: top * rem, height: height * rem, from: first, to: Math.min(first + columns, to) });
    }
  }
  list.style.height = `${top}rem`;
  $("#empty").hidden = shown.length > 0;
  drawn.clear();
  list.replaceChildren();
  draw();
}

function draw() {
  frame = 0;
  const above = scrollY - list.offsetTop;
  const near = rows.filter((row) => row.top < above + 2 * innerHeight && row.top + row.height > above - innerHeight);
  for (const [row, element] of drawn) if (!near.includes(row) && drawn.delete(row)) element.remove();
  let next = null;
  for (const row of near.reverse()) {
    if (!drawn.has(row)) drawn.set(row, list.insertBefore(row.span ? heading(row) : cards(row), next));
    next = drawn.get(row);
  }
  // The tab key goes to one card, the arrow keys from there to all others.
  if (!list.querySelector(`[data-index="${current}"]`)) current = near.filter((row) => !row.span && row.top > above).at(-1)?.from ?? 0;
  for (const element of list.querySelectorAll(".card")) element.tabIndex = Number(element.dataset.index) === current ? 0 : -1;
}

function placed(element, top) {
  element.style.top = `${top}px`;
  return element;
}

function heading({ top, from, to, span }) {
  const below = shown.slice(from, to), failed = below.filter((job) => !job.completed).length, count = sum(below, imageCount);
  const sums = present(count && plural(count, "image"), count && plural(sum(below, credits), "credit"), failed && `${number(failed)} failed`);
  return placed(make("h2", {}, (span === "day" ? days : months).format(below[0][span] * 864e5), make("small", {}, sums.join(" · "))), top);
}

function cards({ top, from, to }) {
  const row = make("div", { class: "row" }, ...shown.slice(from, to).map((job, index) => card(job, from + index)));
  row.style.gridTemplateColumns = `repeat(${columns}, minmax(0, 1fr))`;
  return placed(row, top);
}

function thumb(image, alt) {
  if (!image.thumb) return make("span", { class: "blank", title: image.problem }, image.problem);
  const element = make("img", { src: `${data.files}/${image.thumb}`, loading: "lazy", decoding: "async" });
  element.alt = alt;
  element.onerror = () => element.replaceWith(make("span", { class: "blank" }, "the thumbnail is missing"));
  return element;
}

function card(job, index) {
  const line = (...parts) => make("small", {}, ...parts.map(([part, whole]) => make("span", { class: whole }, part)));
  const what = job.images.length > 1 ? plural(job.images.length, "image") : pixels(job.images[0]);
  const spoken = present(job.short, !job.completed && `${verdict(job)}: ${job.message}`, job.provider, job.completed && cost(job), moments.format(job.at),
    job.images.some((image) => image.has_credentials) && credentials);
  return make("a", { class: job.completed ? "card" : "card failed", href: job.images[0]?.href || opens(job), "data-index": index, "aria-label": spoken.join(", ") },
    make("div", { class: "mat" }, ...(job.completed ? result(job) : [make("b", {}, verdict(job)), make("p", {}, job.message), make("small", {}, job.next)]),
      job.images.some((image) => image.has_credentials) && make("abbr", { title: credentials }, "CR")),
    make("div", { class: "words" }, make("p", {}, job.short),
      line([present(job.provider, job.model).join(" · ") || (job.path === job.title ? "" : job.path)], [job.completed && cost(job), "whole"]), line([short.format(job.at), "whole"], [what])));
}

function result(job) {
  const set = job.images.slice(0, 4).map((image, index) => thumb(image, index ? "" : job.short));
  const images = make("div", { class: `set n${set.length}` }, ...(set.length ? set : [make("span", { class: "blank" }, job.message)]));
  if (!job.inputs.length) return [images];
  const more = job.inputs.length > 3 && make("b", {}, `+ ${job.inputs.length - 3}`);
  return [make("div", { class: "from" }, ...job.inputs.slice(0, 3).map((input) => thumb(input, `input: ${input.name}`)), more, make("b", {}, "→")), images];
}

function reveal(index, first) {
  const row = rows.find((one) => !one.span && one.from <= index && index < one.to);
  const top = list.offsetTop + row.top - $("form").offsetHeight - (first ? 3.5 * rem : rem);
  const bottom = list.offsetTop + row.top + row.height + rem - innerHeight;
  if (first || scrollY > top) scrollTo(0, top);
  else if (scrollY < bottom) scrollTo(0, bottom);
  current = index;
  draw();
  list.querySelector(`[data-index="${index}"]`).focus({ preventScroll: true });
}

/** Return the card above or below: in the next row, at most as far to the right. */
function beside(direction) {
  const all = rows.filter((row) => !row.span), here = all.findIndex((row) => row.from <= current && current < row.to);
  const there = all[here + direction];
  return there ? Math.min(there.from + current - all[here].from, there.to - 1) : current;
}

// What the daemon reports: why nothing is sent, and what waits. Other people may have written it, as all else here.

const sentence = (text) => (/[.!?…]$/.test(text) ? text : `${text}.`);
const time = (moment) => make("time", {}, short.format(moment));

function report(status) {
  const { state, holds = [], waiting, ignored, stuck } = status;
  const heading = (text) => make("strong", {}, text);
  const next = (text) => text && make("small", {}, sentence(`Next step: ${text}`));
  const stop = (title, ...more) => make("div", { class: "stop" }, heading(title), ...more);
  const items = [], runs = state === "running" || state === "on_hold";
  if (state === "overdue") {
    items.push(stop("The daemon is not running.", make("p", {}, "Its next report was due ", time(status.due_at || status.reported_at),
      ". Prompts wait in the inbox until it runs again."), next("ask your administrator to start it")));
  }
  if (state === "stopped") {
    items.push(stop("The daemon is stopped.", make("p", {}, "Prompts wait in the inbox until it is started again."),
      next("ask your administrator to start it"), status.stopped_at && make("small", {}, "since ", time(status.stopped_at))));
  }
  for (const hold of holds) {
    const whose = present(hold.provider && `provider ${hold.provider}`, hold.folder && `folder ${hold.folder}`).join(", ");
    const since = hold.since && make("span", {}, "since ", time(hold.since));
    const until = !runs ? null : hold.next_try_at ? make("span", {}, "next try at ", time(hold.next_try_at)) : "until the administrator ends it";
    items.push(stop(`On hold (${hold.kind}): ${whose || "all prompts"}`, make("p", {}, sentence(hold.message)),
      hold.next && make("small", {}, sentence(hold.next.startsWith("no action needed") ? `N${hold.next.slice(1)}` : `For the administrator: ${hold.next}`)),
      (since || until) && make("small", {}, since, since && until && " · ", until)));
  }
  if (state === "on_hold" && !holds.length) items.push(stop("On hold: all prompts"));
  const since = status.oldest_since && make("span", {}, ", the oldest since ", time(status.oldest_since));
  const lines = present(
    group(waiting, waiting.count === 1 ? "prompt waits" : "prompts wait", since),
    status.in_flight && make("p", {}, `${plural(status.in_flight, "request")} in flight`),
    group(ignored, ignored.count === 1 ? "file in the inbox is ignored" : "files in the inbox are ignored"),
    group(stuck, stuck.count === 1 ? "job cannot finish" : "jobs cannot finish"),
    state === "overdue" && make("small", {}, "Last report: ", time(status.reported_at)),
    runs && make("small", {}, "State at ", time(data.written)));
  return present(...items, items.length && lines.length && make("div", { class: "turn" }), ...lines); // the lines begin below the boxes
}

/** Return a line with a count, which opens to a list of files with their reasons. */
function group({ count = 0, files = [] }, what, more) {
  if (!count) return null;
  const title = [`${number(count)} ${what}`, more].filter(Boolean);
  if (!files.length) return make("p", {}, ...title);
  const lines = files.map((file) => make("li", {}, make("b", {}, file.name), " ", file.message, file.next && make("small", {}, sentence(`Next step: ${file.next}`))));
  const rest = count > files.length && make("li", {}, `and ${number(count - files.length)} more`);
  return make("details", {}, make("summary", {}, ...title), make("ul", {}, ...lines, rest));
}

// The large view: the parts of a job are its images (or its message, if it failed), then its inputs.

const view = $("#view");
let at = 0, part = 0;
const own = (job) => (job.completed ? Math.max(job.images.length, 1) : 1);

function enlarge(index, image) {
  const job = shown[index], parts = job.completed && job.images.length ? [...job.images, ...job.inputs] : [null, ...job.inputs];
  [at, part] = [index, Math.min(image, parts.length - 1)];
  const buttons = parts.map((one, k) => {
    const name = k >= own(job) ? `input ${k - own(job) + 1}` : !job.completed ? "message" : own(job) > 1 ? String(k + 1) : "result";
    const button = make("button", { type: "button", "aria-current": String(k === part) }, one ? thumb(one, "") : make("span", { class: "blank" }, "!"), name);
    button.addEventListener("click", () => enlarge(at, k));
    return button;
  });
  const inputs = buttons.splice(own(job));
  $(".strip").replaceChildren(...(parts.length > 1 ? present(...inputs, inputs.length && make("i", {}, "→"), ...buttons) : []));
  $(".stage").replaceChildren(stage(job, parts[part]));
  $("aside").replaceChildren(...details(job, parts[part]).filter(Boolean));
  $("#before").disabled = at === 0 && part === 0;
  $("#after").disabled = at === shown.length - 1 && part >= own(job) - 1;
  if (!view.open) {
    view.showModal(); // it may have scrolled to the first link
    $("#close").focus({ preventScroll: true });
  }
  view.scrollTop = 0; // on a phone the image is above its details
  remember();
}

function stage(job, image) {
  if (!image) {
    return make("article", {}, !job.completed && make("h3", {}, verdict(job)), make("p", {}, job.message),
      job.problems.length > 1 && make("ul", {}, ...job.problems.map((problem) => make("li", {}, problem))),
      job.next && make("p", { class: "next" }, `Next step: ${job.next}.`));
  }
  const blank = (why) => make("div", { class: "blank" }, `${image.name}: ${why}`);
  if (!image.thumb) return blank(image.problem); // an image that was too large for a thumbnail may be too large for this browser
  const element = make("img", { src: image.href });
  element.alt = job.inputs.includes(image) ? `input: ${image.name}` : job.title;
  element.onerror = () => element.replaceWith(blank("the file is missing"));
  return element;
}

function details(job, image) {
  const facts = {
    Outcome: job.completed ? "completed" : "failed", Cost: cost(job), Needed: job.needs == null ? "" : plural(job.needs, "credit"),
    Status: present(job.status, job.code).join(" "), Provider: job.provider, Model: job.model, Date: moments.format(job.at),
    Size: present(pixels(image), image?.bytes && size(image.bytes)).join(", "), Took: job.seconds ? `${number(job.seconds)} s` : "",
    "Asked for": present(job.asked > 1 && plural(job.asked, "image"), job.options).join(", "),
    Problem: present(image?.thumb && image.problem, ...(job.completed ? job.problems : [])).join("; "),
    Credentials: image?.has_credentials && credentials, File: image?.name, Name: job.path, Job: job.job,
  };
  const table = Object.entries(facts).filter(([, value]) => value).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]);
  const links = [[image?.href, "Open the image"], [opens(job), job.completed ? "Receipt" : "Error file"]].filter(([href]) => href);
  const button = job.prompt && !job.is_cut && make("button", { type: "button", class: "copy", "aria-live": "polite" }, "Copy prompt");
  if (button) button.addEventListener("click", () => copy(job.prompt, button));
  const dates = table.filter((one, k) => table[k - 1]?.textContent === "Date");
  for (const date of dates) date.className = "date";
  return [make("p", { class: "prompt" }, job.title), button, make("dl", {}, ...table), ...links.map(([href, name]) => make("a", { href, target: "_blank", rel: "noopener noreferrer" }, name))];
}

/** Copy a prompt without control characters: pasted into a terminal, they could run a command. */
async function copy(prompt, button) {
  const text = prompt.replace(/[\0-\x08\x0b-\x1f\x7f-\x9f]/g, "");
  const copied = await navigator.clipboard?.writeText(text).then(() => true, () => false) || copySelected(text);
  button.textContent = copied ? "Copied" : "Not copied. Select the text above";
  setTimeout(() => { button.textContent = "Copy prompt"; }, 2500);
  button.focus({ preventScroll: true });
}

/** Copy where a browser offers its clipboard to no script: on a web server without TLS. */
function copySelected(text) {
  const field = make("textarea", { class: "offstage", readonly: "readonly" });
  field.value = text;
  view.append(field);
  field.select();
  const copied = document.execCommand("copy");
  field.remove();
  return copied;
}

function turn(direction) {
  const last = own(shown[at]) - 1, next = part > last ? (direction > 0 ? last + 1 : 0) : part + direction;
  if (next >= 0 && next <= last) enlarge(at, next);
  else if (shown[at + direction]) enlarge(at + direction, direction > 0 ? 0 : own(shown[at - 1]) - 1);
}

/** Close the view and go to the card of its job. Not in the dialog's own close event, which may come after the next key. */
function leave() {
  view.close();
  remember();
  reveal(at);
}

// Input.

/** Clear the search and stay at the same job. */
function clearSearch() {
  const job = list.contains(document.activeElement) && shown[current];
  fields.q.value = "";
  choose();
  remember();
  if (job) reveal(shown.indexOf(job));
}

const typing = () => /INPUT|SELECT/.test(document.activeElement.tagName);
const moves = { ArrowRight: () => current + 1, ArrowLeft: () => current - 1, ArrowDown: () => beside(1), ArrowUp: () => beside(-1), Home: () => 0, End: () => shown.length - 1 };

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const sideways = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (view.open) {
    if (sideways) turn(sideways);
  } else if (event.isComposing) {
    return; // the key belongs to an input method
  } else if (event.key === "Escape" && fields.q.value && (document.activeElement === fields.q || !typing())) {
    event.preventDefault();
    clearSearch();
  } else if (typing()) {
    if (event.key === "Escape") document.activeElement.blur();
    if (event.key === "Enter" && document.activeElement === fields.q && shown.length) {
      event.preventDefault();
      reveal(current);
    }
  } else if (event.key === "/") {
    event.preventDefault();
    fields.q.select();
  } else if (moves[event.key] && shown.length) {
    const inside = list.contains(document.activeElement);
    if (!inside && !sideways) return; // the page scrolls as any other
    event.preventDefault();
    reveal(inside ? Math.min(Math.max(moves[event.key](), 0), shown.length - 1) : current);
  }
});
list.addEventListener("focusin", (event) => { current = Number(event.target.dataset.index); });
list.addEventListener("click", (event) => {
  const chosen = event.target.closest(".card");
  if (!chosen || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  enlarge(Number(chosen.dataset.index), 0);
});
$("form").addEventListener("submit", (event) => event.preventDefault());
$("form").addEventListener("input", () => { choose(); remember(); });
view.addEventListener("cancel", (event) => { event.preventDefault(); leave(); });
$("#before").addEventListener("click", () => turn(-1));
$("#after").addEventListener("click", () => turn(1));
$("#close").addEventListener("click", leave);
addEventListener("scroll", () => { frame ||= requestAnimationFrame(draw); }, { passive: true });
addEventListener("resize", arrange);
addEventListener("hashchange", recall);

// The button is named after what it does. From the system's colors it goes to the others first, which is a visible change.
const themes = { "": "Use the system's colors", light: "Use light colors", dark: "Use dark colors" };
const darkness = matchMedia("(prefers-color-scheme: dark)");
function following() {
  const theme = document.documentElement.dataset.theme, [system, other] = darkness.matches ? ["dark", "light"] : ["light", "dark"];
  return { "": other, [other]: system, [system]: "" }[theme];
}
function dress(theme) {
  document.documentElement.dataset.theme = theme;
  $("#theme").textContent = themes[following()];
}
darkness.addEventListener("change", () => dress(document.documentElement.dataset.theme));
const keep = (call) => { try { return call(localStorage); } catch { return null; } }; // some browsers store nothing for a local file
$("#theme").addEventListener("click", () => {
  const theme = following();
  dress(theme);
  keep((storage) => storage.setItem("imagewatch-theme", theme));
});

/** Check regularly whether this page is still the newest: its stamp is an image, because a local page may load nothing else. */
function ask(then) {
  const stamp = new Image();
  stamp.onload = () => setTimeout(ask, 4000, outdated);
  stamp.onerror = then;
  stamp.src = `${data.files}/${data.stamp}?${Date.now()}`;
}
function outdated() {
  const busy = view.open || typing() || document.querySelector("details[open]");
  if (scrollY < 200 && !busy && !document.hidden) location.reload();
  $("#newer").hidden = false;
  setTimeout(ask, 4000, outdated);
}
$("#newer").addEventListener("click", () => location.reload());

$("h1").textContent = data.shown.title;
$("#notes").append(...data.shown.notes.map((note) => make("li", {}, note)));
$("#notes").hidden = !data.shown.notes.length;
$("#foot").append("Written ", make("time", {}, moments.format(data.written)), ` by imagewatch ${data.version}. Credits are those of the receipts shown.`);
$("#status").append(...(data.shown.status ? report(data.shown.status) : []));
$("#status").hidden = !data.shown.status;
$(jobs.length ? "#none" : "#nothing").hidden = false;
$("#all").addEventListener("click", () => { history.replaceState(null, "", "#"); recall(); });
const theme = keep((storage) => storage.getItem("imagewatch-theme"));
dress(Object.hasOwn(themes, theme ?? "") ? theme ?? "" : "");
offer(fields.provider, "All providers", jobs.map((job) => job.provider));
offer(fields.folder, "All folders", jobs.map((job) => job.folder));
recall();
ask(() => {}); // no stamp at the first time: a copy of the page, which is never written again
