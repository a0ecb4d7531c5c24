"use strict";
(() => {
  const data = JSON.parse(document.getElementById("inspected").textContent);
  const $ = (id) => document.getElementById(id);
  const SCORED = 1, IN_DIVERGENCE = 2, IN_LIKELIHOOD = 4;
  const BLOCK = 256; // tokens that are laid out together
  const MOST_BLOCKS = 60; // so many stay, wherever the reader has been
  const special = new Set(data.special);

  // --- What the columns hold ---------------------------------------------------------------------------------------
  const unpacked = (text, Type) => {
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    return new Type(bytes.buffer);
  };
  const places = (text) => unpacked(text, data.bytes_per_place === 2 ? Uint16Array : Uint32Array);
  const opened = new Map(); // rollouts that have been read, by their number

  const rollout = (number) => {
    if (opened.has(number)) return opened.get(number);
    const given = data.rollouts[number];
    const tokens = places(given.completion);
    const values = {};
    for (const [name, column] of Object.entries(given.values)) {
      values[name] = typeof column === "number" ? new Float32Array(tokens.length).fill(column) : unpacked(column, Float32Array);
    }
    const result = {
      number, given, tokens, values,
      flags: unpacked(given.flags, Uint8Array),
      listed: places(given.listed_tokens),
      costs: unpacked(given.listed_costs, Uint16Array),
      pieces: piecesOf(tokens),
    };
    opened.set(number, result);
    return result;
  };

  const measured = (its, key, index) => {
    const value = (name) => its.values[name][index];
    if (key === "delta") return value("teacher_log_prob") - value("student_log_prob");
    if (key === "weighted") return value("w") * value("divergence");
    if (key === "gap") return value("student_entropy") - value("teacher_entropy");
    return value(key);
  };
  // Streams are known of tokens that nobody has scored, too
  const isKnown = (its, key, index) => its.flags[index] & SCORED || ["w", "A", "v"].includes(key);

  // --- Tokens as text ------------------------------------------------------------------------------------------------
  const bytesOf = (place) => Uint8Array.from(data.tokens[place], (character) => character.charCodeAt(0));
  const strict = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
  const decoded = (bytes) => { try { return strict.decode(bytes); } catch { return null; } };
  const width = (byte) => (byte < 0x80 ? 1 : byte >= 0xc2 && byte < 0xe0 ? 2 : byte >= 0xe0 && byte < 0xf0 ? 3 : byte >= 0xf0 && byte < 0xf5 ? 4 : 0);
  const hex = (byte) => byte.toString(16).toUpperCase().padStart(2, "0");

  // Of each token the parts it is shown by: text, or bytes of a character that other tokens complete. That character is
  // text of the token with its last byte.
  const piecesOf = (tokens) => {
    const pieces = Array.from(tokens, () => []);
    let open = []; // bytes of a character that is not complete, with their tokens
    const put = (index, kind, text) => {
      const last = pieces[index].at(-1);
      if (last && last.kind === kind) last.text += (kind === "byte" ? " " : "") + text;
      else pieces[index].push({ kind, text });
    };
    const giveUp = () => { for (const [byte, index] of open) put(index, "byte", hex(byte)); open = []; };
    tokens.forEach((place, index) => {
      if (!open.length) { // nearly always
        const whole = decoded(bytesOf(place));
        if (whole !== null) { if (whole) put(index, "text", whole); return; }
      }
      for (const byte of bytesOf(place)) {
        if (open.length && (byte & 0xc0) !== 0x80) giveUp();
        open.push([byte, index]);
        const needed = width(open[0][0]);
        if (needed === 0) { giveUp(); continue; }
        if (open.length < needed) continue;
        const character = decoded(Uint8Array.from(open, ([its]) => its));
        if (character === null) { giveUp(); continue; }
        if (open[0][1] !== index) for (const [its, at] of open) put(at, "byte", hex(its));
        put(index, "text", character);
        open = [];
      }
    });
    giveUp();
    return pieces;
  };
  const textOf = (pieces) => pieces.map((piece) => (piece.kind === "text" ? piece.text : "")).join("");
  const plain = (tokens) => piecesOf(tokens).map(textOf).join("");

  // What one would not see, or what would change what is beside it, by a sign or its number
  const visible = (text, space = "·") => text.replace(
    /[\x00-\x20\x7f-\xa0\xad\u061c\u115f\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\u{e0000}-\u{e007f}]/gu,
    (character) => {
      const code = character.codePointAt(0);
      if (character === " ") return space;
      if (character === "\n") return "↵";
      if (character === "\t") return "⇥";
      if (code < 0x20) return String.fromCodePoint(0x2400 + code);
      return `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
    },
  );
  const shown = (place) => piecesOf([place])[0].map((piece) => (piece.kind === "text" ? visible(piece.text) : `⟨${piece.text}⟩`)).join("") || "⟨⟩";
  const element = (name, text, attributes = {}) => {
    const made = document.createElement(name);
    if (text !== null) made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };
  const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toPrecision(3);
  const number = (value) => (value < 0 ? "−" : "") + Math.abs(value).toPrecision(3);
  const percent = (p) => (p >= 0.9995 && p < 1 ? ">99.9" : p < 5e-4 ? (100 * p).toExponential(0) : (100 * p).toFixed(1)) + " %";

  // --- The list of rollouts ------------------------------------------------------------------------------------------
  const facts = data.rollouts.map((its) => its.facts);
  const length = (its) => Math.round((its.flags.length * 3) / 4 - (its.flags.endsWith("==") ? 2 : its.flags.endsWith("=") ? 1 : 0));
  const SORTS = {
    "loss": (a, b) => b.loss - a.loss,
    "reward": (a, b) => (b.facts.reward ?? -Infinity) - (a.facts.reward ?? -Infinity),
    "length": (a, b) => length(b) - length(a),
    "mean log-ratio": (a, b) => b.means.delta - a.means.delta,
    "mean divergence": (a, b) => b.means.divergence - a.means.divergence,
  };
  const texts = new Map(); // by number: prompts and completion, lower case
  const searchable = (index) => {
    if (!texts.has(index)) {
      const given = data.rollouts[index];
      const prompts = [given.student_prompt, given.teacher_prompt].filter((its) => its !== null).map((its) => plain(places(its)));
      const own = rollout(index).pieces.map(textOf);
      texts.set(index, { prompts: prompts.join("\n").toLowerCase(), own: own.join("").toLowerCase() });
    }
    return texts.get(index);
  };
  let order = [], current = -1, query = "";

  const list = () => {
    const by = SORTS[$("sort").value];
    order = data.rollouts.map((_, index) => index);
    if (by) order.sort((a, b) => by(data.rollouts[a], data.rollouts[b]) || a - b);
    if (query) order = order.filter((index) => { const its = searchable(index); return its.own.includes(query) || its.prompts.includes(query); });
    $("found").textContent = query ? `${order.length} of ${data.rollouts.length} rollouts` : `${data.rollouts.length} rollouts`;
    $("rollouts").replaceChildren(...order.map((index) => {
      const given = data.rollouts[index], its = given.facts;
      const line = [`loss ${number(given.loss)}`, `${length(given)} tokens`];
      if (its.reward !== null && its.reward !== undefined) line.splice(1, 0, `reward ${number(its.reward)}`);
      const button = element("button", null, { type: "button", "data-number": index });
      button.append(element("span", line.join(" · ")));
      const start = places(given.completion).slice(0, 24);
      button.append(element("span", visible(plain(start)), { class: "text" }));
      const item = element("li", null);
      item.append(button);
      return item;
    }));
    marked();
  };
  const marked = () => {
    for (const button of $("rollouts").querySelectorAll("button")) {
      if (Number(button.dataset.number) === current) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    }
  };

  // --- One rollout ---------------------------------------------------------------------------------------------------
  let its = null, selected = 0, blocks = [], filled = new Set(), matches = [], heightOfBlock = 0;

  const open = (index) => {
    current = index;
    its = rollout(index);
    selected = 0;
    find();
    const line = [["loss", number(its.given.loss)], ["tokens", its.tokens.length], ...Object.entries(its.given.facts)];
    $("facts").replaceChildren(...line.filter(([, value]) => value !== null).map(([name, value]) => {
      const span = element("span", `${name}: `, { class: "quiet" });
      span.append(element("b", typeof value === "number" && !Number.isInteger(value) ? number(value) : visibleText(String(value))));
      return span;
    }));
    for (const side of ["student", "teacher"]) { $(side).open = $(side).open && its.given[`${side}_prompt`] !== null; showPrompt(side); }
    $("teacher").querySelector("summary").textContent = its.given.teacher_prompt === null ? "No teacher's prompt: this row has no context" : "Teacher's prompt, its own part marked";
    blocks = [];
    filled = new Set();
    watcher.disconnect();
    for (let from = 0; from < its.tokens.length; from += BLOCK) {
      blocks.push(element("div", null, { class: "block", "data-block": blocks.length }));
    }
    $("tokens").replaceChildren(...blocks);
    if (blocks.length) { fill(0); heightOfBlock = blocks[0].offsetHeight; }
    blocks.forEach((block, number) => { if (!filled.has(number)) block.style.height = `${heightOfBlock}px`; watcher.observe(block); });
    $("strip").setAttribute("aria-valuemax", its.tokens.length);
    draw();
    marked();
    select(0, false);
  };
  const visibleText = (text) => text.split("\n").map((line) => visible(line, " ")).join("\n");

  const showPrompt = (side) => {
    const pre = $(side).querySelector("pre");
    pre.replaceChildren();
    if (!$(side).open || its === null || its.given[`${side}_prompt`] === null) return;
    const tokens = places(its.given[`${side}_prompt`]);
    let start = 0, end = tokens.length;
    if (side === "teacher") {
      const other = places(its.given.student_prompt);
      const most = Math.min(tokens.length, other.length);
      while (start < most && tokens[start] === other[start]) start += 1;
      while (tokens.length - end < most - start && tokens[end - 1] === other[other.length - 1 - tokens.length + end]) end -= 1;
    }
    const part = (from, to) => visibleText(plain(tokens.slice(from, to)));
    pre.append(part(0, start), side === "teacher" ? element("mark", part(start, end)) : part(start, end), part(end));
  };

  const key = () => $("measure").value;
  const scale = () => data.measures.find((measure) => measure.key === key()).scale;
  const paint = (span, index) => {
    span.className = "t";
    if (!(its.flags[index] & (IN_DIVERGENCE | IN_LIKELIHOOD))) span.classList.add("masked");
    if (special.has(its.tokens[index])) span.classList.add("special");
    if (matches[index]) span.classList.add("found");
    if (index === selected) span.classList.add("current");
    const value = isKnown(its, key(), index) ? measured(its, key(), index) : 0;
    if (value !== 0) {
      span.classList.add(value > 0 ? "up" : "down");
      span.style.setProperty("--a", Math.min(1, Math.abs(value) / scale()).toFixed(3));
    }
  };
  const fill = (number) => {
    if (filled.has(number) || !blocks[number]) return;
    const parts = [];
    for (let index = number * BLOCK; index < Math.min(its.tokens.length, (number + 1) * BLOCK); index += 1) {
      const span = element("span", null, { "data-i": index, id: `t${index}` });
      let breaks = 0;
      for (const piece of its.pieces[index]) {
        if (piece.kind === "byte") span.append(element("span", piece.text, { class: "byte" }));
        else { span.append(visible(piece.text)); breaks += piece.text.split("\n").length - 1; }
      }
      if (!span.hasChildNodes()) span.append(element("span", "⟨⟩", { class: "byte" }));
      paint(span, index);
      parts.push(span);
      for (let line = 0; line < Math.min(breaks, 2); line += 1) parts.push(element("br", null));
    }
    blocks[number].replaceChildren(...parts);
    blocks[number].style.height = "";
    filled.add(number);
  };
  const empty = (number) => {
    blocks[number].style.height = `${blocks[number].offsetHeight}px`;
    blocks[number].replaceChildren();
    filled.delete(number);
  };
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) fill(Number(entry.target.dataset.block));
    if (filled.size > MOST_BLOCKS) {
      const middle = visibleRange()[0] / BLOCK;
      for (const number of [...filled]) if (Math.abs(number - middle) > MOST_BLOCKS / 2) empty(number);
    }
    place();
  }, { rootMargin: "1200px 0px" });
  const repaint = () => {
    for (const number of filled) for (const span of blocks[number].querySelectorAll("[data-i]")) { span.style.removeProperty("--a"); paint(span, Number(span.dataset.i)); }
    draw();
  };

  // --- The strip -----------------------------------------------------------------------------------------------------
  const draw = () => {
    const canvas = $("strip").firstElementChild, box = $("strip").getBoundingClientRect(), density = devicePixelRatio || 1;
    canvas.width = Math.max(1, Math.round(box.width * density));
    canvas.height = Math.round(box.height * density);
    const context = canvas.getContext("2d"), middle = canvas.height / 2, total = its.tokens.length, full = scale(), name = key();
    const probe = element("span", null);
    document.body.append(probe);
    const color = (variable) => { probe.style.color = `var(${variable})`; return getComputedStyle(probe).color; };
    const colors = { up: color("--up"), down: color("--down"), line: color("--line") };
    probe.remove();
    const high = new Float64Array(canvas.width), low = new Float64Array(canvas.width);
    for (let index = 0; index < total; index += 1) {
      if (!isKnown(its, name, index)) continue;
      const value = measured(its, name, index);
      const first = Math.floor((index * canvas.width) / total), last = Math.max(first + 1, Math.floor(((index + 1) * canvas.width) / total));
      for (let x = first; x < Math.min(last, canvas.width); x += 1) { high[x] = Math.max(high[x], value); low[x] = Math.min(low[x], value); }
    }
    for (let x = 0; x < canvas.width; x += 1) {
      context.fillStyle = colors.up;
      const up = Math.min(1, high[x] / full) * middle;
      context.fillRect(x, middle - up, 1, up);
      context.fillStyle = colors.down;
      context.fillRect(x, middle, 1, Math.min(1, -low[x] / full) * middle);
    }
    context.fillStyle = colors.line;
    context.fillRect(0, Math.round(middle), canvas.width, 1);
  };
  // First and last token on the screen, by the share of their block that is
  const visibleRange = () => {
    const at = (y) => {
      let low = 0, high = blocks.length - 1;
      while (low < high) { const middle = (low + high) >> 1; if (blocks[middle].getBoundingClientRect().bottom < y) low = middle + 1; else high = middle; }
      if (!blocks.length) return 0;
      const box = blocks[low].getBoundingClientRect();
      return Math.max(0, Math.min(its.tokens.length, (low + Math.max(0, Math.min(1, (y - box.top) / (box.height || 1)))) * BLOCK));
    };
    return [at($("bar").getBoundingClientRect().bottom), at(innerHeight)];
  };
  const place = () => {
    if (its === null) return;
    const [first, last] = visibleRange(), total = its.tokens.length || 1;
    $("window").style.left = `${(100 * first) / total}%`;
    $("window").style.width = `${(100 * Math.max(0, last - first)) / total}%`;
  };
  const goTo = (index) => {
    index = Math.max(0, Math.min(its.tokens.length - 1, index));
    fill(Math.floor(index / BLOCK));
    const middle = () => $(`t${index}`)?.scrollIntoView({ block: "center" });
    middle();
    requestAnimationFrame(middle); // what has been laid out beside it may have moved it
    select(index, true);
  };

  // --- One token -----------------------------------------------------------------------------------------------------
  const select = (index, focuses) => {
    $(`t${selected}`)?.classList.remove("current");
    selected = index;
    $(`t${selected}`)?.classList.add("current");
    $("strip").setAttribute("aria-valuenow", index + 1);
    if (focuses) $("tokens").setAttribute("aria-activedescendant", `t${index}`);
    show(index);
  };
  const show = (index) => {
    const parts = [];
    const place = its.tokens[index];
    if (place === undefined) { $("token").replaceChildren(); return; }
    parts.push(element("h2", shown(place)));
    parts.push(element("div", `token ${index + 1} of ${its.tokens.length}, id ${data.ids[place]}`, { class: "quiet" }));
    const flags = its.flags[index], notes = [];
    if (!(flags & SCORED)) notes.push("The teacher has not read it: there is no context, or somebody else wrote it.");
    else if (!(flags & IN_DIVERGENCE) && "w" in its.values) notes.push("Masked: the divergence does not count it.");
    if (!(flags & IN_LIKELIHOOD) && "v" in its.values) notes.push("Masked: the likelihood does not count it.");
    for (const note of notes) parts.push(element("p", note, { class: "note" }));
    const table = element("table", null, { class: "measures" });
    for (const measure of data.measures) {
      if (!isKnown(its, measure.key, index)) continue;
      const row = element("tr", null, { "data-measure": measure.key, title: measure.help });
      row.append(element("th", measure.label), element("td", signed(measured(its, measure.key, index))));
      table.append(row);
    }
    parts.push(table);
    if (flags & SCORED) {
      for (const [side, who] of ["student", "teacher"].entries()) {
        parts.push(element("h3", `${who === "student" ? "Student" : "Teacher"}'s most probable tokens`));
        const listed = element("table", null, { class: `listed ${who}` });
        const add = (token, p, isSampled) => {
          const row = element("tr", null, isSampled ? { class: "sampled" } : {});
          row.style.setProperty("--p", p.toFixed(4));
          row.append(element("th", shown(token), { title: `id ${data.ids[token]}` }), element("td", percent(p)));
          listed.append(row);
        };
        let isListed = false;
        for (let rank = 0; rank < data.num_listed; rank += 1) {
          const at = (index * 2 + side) * data.num_listed + rank;
          if (its.costs[at] === 65535) continue;
          isListed ||= its.listed[at] === place;
          // The sampled token's is kept whole
          const log = its.listed[at] === place ? its.values[`${who}_log_prob`][index] : -its.costs[at] / 1000;
          add(its.listed[at], Math.exp(log), its.listed[at] === place);
        }
        if (!isListed) add(place, Math.exp(its.values[`${who}_log_prob`][index]), true);
        parts.push(listed);
      }
    }
    $("token").replaceChildren(...parts);
  };

  // --- Search within the rollout --------------------------------------------------------------------------------------
  const find = () => {
    matches = [];
    if (!query || its === null) return;
    const own = its.pieces.map(textOf);
    const { own: text } = searchable(current);
    const starts = [];
    let start = 0;
    for (const piece of own) { starts.push(start); start += piece.toLowerCase().length; }
    let token = 0;
    for (let at = text.indexOf(query); at >= 0; at = text.indexOf(query, at + 1)) {
      while (token + 1 < starts.length && starts[token + 1] <= at) token += 1;
      for (let index = token; index < starts.length && starts[index] < at + query.length; index += 1) if (own[index]) matches[index] = true;
    }
  };
  const next = (isWanted, step) => {
    for (let index = selected + step; index >= 0 && index < its.tokens.length; index += step) if (isWanted(index)) { goTo(index); return; }
  };

  // --- What the reader does -------------------------------------------------------------------------------------------
  $("sort").append(...[...Object.keys(SORTS), "as sampled"].map((name) => element("option", name)));
  $("measure").append(...data.measures.map((measure) => element("option", measure.label, { value: measure.key })));
  const legend = () => {
    const measure = data.measures.find((measure) => measure.key === key());
    $("legend").textContent = `−${measure.scale.toPrecision(3)} … 0 … +${measure.scale.toPrecision(3)}`;
    $("help").textContent = measure.help;
  };
  $("sort").addEventListener("change", list);
  $("measure").addEventListener("change", () => { legend(); repaint(); });
  $("search").addEventListener("input", () => {
    query = $("search").value.toLowerCase();
    list();
    if (order.length && !order.includes(current)) open(order[0]);
    else { find(); repaint(); }
  });
  $("search").addEventListener("keydown", (event) => {
    if (event.key === "Enter") next((index) => matches[index] && !matches[index - 1], event.shiftKey ? -1 : 1);
  });
  $("rollouts").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) open(Number(button.dataset.number));
  });
  for (const side of ["student", "teacher"]) $(side).addEventListener("toggle", () => showPrompt(side));
  const tokenAt = (event) => event.target.closest?.("[data-i]");
  $("tokens").addEventListener("mouseover", (event) => { const span = tokenAt(event); if (span) show(Number(span.dataset.i)); });
  $("tokens").addEventListener("mouseleave", () => show(selected));
  $("tokens").addEventListener("click", (event) => { const span = tokenAt(event); if (span) select(Number(span.dataset.i), true); });
  const toStrip = (event) => {
    const box = $("strip").getBoundingClientRect();
    goTo(Math.floor(((event.clientX - box.left) / box.width) * its.tokens.length));
  };
  $("strip").addEventListener("pointerdown", (event) => { $("strip").setPointerCapture(event.pointerId); toStrip(event); });
  $("strip").addEventListener("pointermove", (event) => { if (event.buttons) toStrip(event); });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const target = document.activeElement;
    if (["INPUT", "SELECT"].includes(target.tagName)) { if (event.key === "Escape") { target.blur(); $("tokens").focus({ preventScroll: true }); } return; }
    const onStrip = target === $("strip");
    const step = onStrip ? Math.max(1, Math.round(its.tokens.length / 50)) : 1;
    const hot = (index) => isKnown(its, key(), index) && Math.abs(measured(its, key(), index)) >= scale() / 2;
    const turn = (by) => { const at = order.indexOf(current) + by; if (order[at] !== undefined) { open(order[at]); $("rollouts").querySelector("[aria-current]")?.scrollIntoView({ block: "nearest" }); } };
    const actions = {
      ArrowRight: () => goTo(selected + step), ArrowLeft: () => goTo(selected - step),
      Home: () => goTo(0), End: () => goTo(its.tokens.length - 1),
      n: () => next(hot, 1), p: () => next(hot, -1), j: () => turn(1), k: () => turn(-1),
      "/": () => $("search").focus(),
    };
    if (actions[event.key]) { event.preventDefault(); actions[event.key](); }
  });
  document.addEventListener("scheme", () => draw());
  addEventListener("scroll", place, { passive: true });
  addEventListener("resize", () => { draw(); place(); });

  legend();
  list();
  open(order[0]);
})();
