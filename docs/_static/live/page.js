/* The live page: controls, picture, tokens and the FLOP meter, around the model of qwen2.js. */
"use strict";

(function () {
  const { scale, precision, grammar: rules, price, step: trainingStep, cap, series: texts } = window.LIVE;
  const NAMES = ["prey", "predator"], OWN = "own", STEPS = 100;
  const at = (id) => document.getElementById(`live-${id}`);
  const steps = (text) => text.split(";").slice(0, -1).map((step) => step.split(",").map((number) => number / scale));
  const encode = (values) => values.map((row) => row.map((v) => Math.max(0, v * scale).toFixed(precision)).join(",") + ";").join("");
  const show = (value) => value.toFixed(precision);
  const flops = (value) => (value ? value.toExponential(2).replace("e+", "e") : "0");

  let model, grammar; // made when the page has been drawn
  let own = null; // the reader's own series, (steps, 2)
  let turn = 0; // of the newest forecast; an older one stops
  let shown = { values: [], greedy: [], paths: [], end: 0, seen: 0, ahead: 0 }; // what the picture shows

  /* ---------------------------------------------------------------- the price, from the account's coefficients */

  const promptCost = (n) => price.prompt.reduce((sum, c, power) => sum + c * n ** power, 0);
  const tokensCost = (prompt, n) => {
    let sum = 0;
    for (let i = 0; i < n; i++) sum += price.token[0] + price.token[1] * (prompt + i);
    return sum;
  };

  /* ---------------------------------------------------------------- one forecast */

  /** Random numbers that follow from a seed (Marsaglia's xorshift, 2003): the same path for the same choice. */
  function randomNumbers(seed) {
    let x = (seed * 2654435761) >>> 0 || 1;
    return () => {
      x ^= x << 13, x >>>= 0, x ^= x >>> 17, x ^= x << 5, x >>>= 0;
      return x / 2 ** 32;
    };
  }

  function schedule(delay = 250) {
    clearTimeout(schedule.timer);
    turn++;
    schedule.timer = setTimeout(run, delay);
  }

  async function run() {
    const mine = ++turn, started = performance.now(), settings = readControls(), { context, ahead, paths } = settings;
    shown = { ...settings, greedy: [], paths: [] };
    const spent = { prompt: [0, 0], greedy: [0, 0], paths: [0, 0] }; // tokens read, FLOPs
    let breath = performance.now();
    /** Let the page live when 40 ms are over; false when the reader has moved on. */
    const goOn = async () => {
      if (performance.now() - breath > 40) {
        await new Promise((resolve) => setTimeout(resolve));
        breath = performance.now();
      }
      return mine === turn;
    };
    const written = [];
    draw();
    const reading = Qwen2.readText(model, grammar, context);
    let now = reading.next();
    for (; !now.done; now = reading.next()) {
      say(`Reading the context: ${now.value} of ${context.length} tokens`);
      spent.prompt = [now.value, promptCost(now.value)];
      meter(spent);
      if (!(await goOn())) return;
    }
    const hidden = now.value;
    for (let path = 0; path <= paths; path++) {
      model.length = context.length; // every path goes on from the context that was read once
      const writing = Qwen2.write(model, grammar, context, hidden, ahead, path ? randomNumbers(path) : null);
      let text = "";
      for (now = writing.next(); !now.done; now = writing.next()) {
        text += now.value.text;
        if (!path) {
          written.push(now.value);
          shown.greedy = steps(text);
          tokens(context, written);
          draw();
        }
        if (!(await goOn())) return;
      }
      const row = path ? spent.paths : spent.greedy;
      row[0] += now.value;
      row[1] += tokensCost(context.length, now.value);
      if (path) shown.paths.push(steps(text));
      say(path < paths ? `Path ${path + 1} of ${paths} …` : "");
      meter(spent);
      draw();
    }
    table();
    conclude(spent, performance.now() - started);
  }

  function readControls() {
    const values = at("series").value === OWN ? own : steps(texts[+at("series").value]);
    at("end").max = Math.min(STEPS, values.length) - 1;
    const end = +at("end").value;
    at("seen").max = end;
    const seen = Math.min(+at("seen").value, end);
    at("end-value").textContent = end;
    at("seen-value").textContent = seen;
    const context = encode(values.slice(end - seen, end));
    return { values, end, seen, context, ahead: +at("ahead").value, paths: +at("paths").value };
  }

  /* ---------------------------------------------------------------- what the reader sees */

  function say(words) {
    at("status").textContent = words;
  }

  function quantile(values, level) {
    const sorted = [...values].sort((a, b) => a - b), place = level * (sorted.length - 1), low = Math.floor(place);
    return sorted[low] + (place - low) * (sorted[Math.min(low + 1, sorted.length - 1)] - sorted[low]);
  }

  const band = (h, variable, level) => quantile(shown.paths.map((path) => path[h][variable]), level);

  function draw() {
    const { values, greedy, paths, end, seen, ahead } = shown, drawing = at("series").value === OWN;
    const svg = at("chart"), width = svg.clientWidth || 700, height = svg.clientHeight || 320;
    const left = 34, right = width - 8, top = 10, bottom = height - 36, n = values.length;
    const largest = Math.max(...values.flat(), ...greedy.flat(), ...paths.flat(2));
    const most = drawing ? Math.max(6, shown.most || 0, ...values.flat()) : largest * 1.08;
    shown.most = most;
    const from = drawing || n <= 45 ? 0 : Math.max(0, Math.min(end - seen, n - 45)); // a wide picture of little would show nothing
    const to = drawing ? n : Math.min(n, Math.max(end + ahead + 3, from + 45));
    const x = (step) => left + ((step - 1 - from) / (to - from - 1)) * (right - left); // steps count from 1
    const y = (value) => bottom - (value / most) * (bottom - top);
    shown.step = (px) => from + 1 + ((px - left) / (right - left)) * (to - from - 1);
    shown.value = (py) => ((bottom - py) / (bottom - top)) * most;
    const line = (points) => points.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
    const parts = [`<rect class="seen" x="${x(end - seen + 1)}" y="${top}" width="${Math.max(0, x(end) - x(end - seen + 1))}" height="${bottom - top}"/>`];
    const unit = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100].find((u) => most / u <= 6) || 200;
    for (let value = 0; value <= most; value += unit) {
      parts.push(`<line class="grid" x1="${left}" x2="${right}" y1="${y(value)}" y2="${y(value)}"/>`);
      parts.push(`<text x="${left - 5}" y="${y(value) + 4}" text-anchor="end">${+value.toFixed(1)}</text>`);
    }
    const every = width < 500 ? 10 : 5;
    for (let step = Math.ceil((from + 1) / every) * every; step <= to; step += every) {
      parts.push(`<text x="${x(step)}" y="${bottom + 15}" text-anchor="middle">${step}</text>`);
    }
    parts.push(`<text x="${(left + right) / 2}" y="${height - 4}" text-anchor="middle">step (population against it)</text>`);
    NAMES.forEach((name, variable) => {
      const truth = values.slice(from, to).map((row, i) => [from + i + 1, row[variable]]);
      parts.push(`<polyline class="${name}" points="${line(truth)}"/>`);
      if (paths.length > 1) {
        const edge = (level) => Array.from({ length: ahead }, (_, h) => [end + h + 1, band(h, variable, level)]);
        parts.push(`<polygon class="${name} band" points="${line([...edge(0.1), ...edge(0.9).reverse()])}"/>`);
      }
      greedy.forEach((row, h) => parts.push(`<circle class="${name}" r="3.2" cx="${x(end + h + 1)}" cy="${y(row[variable])}"/>`));
    });
    parts.push(`<line class="last" x1="${x(end)}" x2="${x(end)}" y1="${top}" y2="${bottom}"/>`);
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.innerHTML = parts.join("");
  }

  const shade = (share) => `style="--share:${Math.round(share * 60)}%" title="probability ${Math.round(share * 100)} %"`;

  function tokens(context, written) {
    const marks = written.map(({ text, share }) => {
      const rest = text.slice(1);
      return `<span class="new" ${shade(share)}>${text[0]}</span>${rest ? `<span class="forced" title="forced">${rest}</span>` : ""}<wbr>`;
    });
    at("tokens").innerHTML = `<span class="read">…${context.slice(-40).replace(/;/g, ";<wbr>")}</span>${marks.join("")}`;
    const doubt = written.reduce((least, token) => (token.share < least.share ? token : least));
    const before = (context + written.slice(0, written.indexOf(doubt)).map((token) => token.text).join("")).slice(-6);
    const others = doubt.likely.map((share, i) => [share, grammar.alphabet[i]]).sort((a, b) => b[0] - a[0]).slice(0, 3);
    const listed = others.map(([share, character]) => `${character} (${Math.round(share * 100)} %)`).join(", ");
    at("doubt").textContent = `Least sure, after …${before}: ${listed}.`;
  }

  function meter(spent) {
    const rows = { "reading the context": spent.prompt, "writing the likeliest forecast": spent.greedy, "writing the paths": spent.paths };
    const total = Object.values(rows).reduce((sum, row) => [sum[0] + row[0], sum[1] + row[1]]);
    rows.together = total;
    at("flops").innerHTML = Object.entries(rows).map(([part, [read, cost]]) => {
      const share = total[1] ? (100 * cost) / total[1] : 0;
      const bar = `<span class="bar" style="width:${(share / 100) * 4}rem"></span> ${Math.round(share)} %`;
      return `<tr><th scope="row">${part}</th><td>${read}</td><td data-exact="${cost}">${flops(cost)}</td><td>${bar}</td></tr>`;
    }).join("");
    at("worth").textContent =
      `One training step of this run cost ${flops(trainingStep)}, as much as ${Math.round(trainingStep / total[1]).toLocaleString("en")} such forecasts; ` +
      `the ceiling of ${flops(cap).replace(".00", "")} would pay for ${flops(cap / total[1])} of them.`;
    return total[1];
  }

  function table() {
    const { values, greedy, paths, end, ahead } = shown;
    at("table").innerHTML = Array.from({ length: ahead }, (_, h) => {
      const cells = NAMES.map((_, variable) => {
        const truth = values[end + h] ? show(values[end + h][variable]) : "–";
        const between = paths.length > 1 ? `${show(band(h, variable, 0.1))}–${show(band(h, variable, 0.9))}` : "–";
        return `<td>${truth}</td><td>${show(greedy[h][variable])}</td><td>${between}</td>`;
      });
      return `<tr><th scope="row">${end + h + 1}</th>${cells.join("")}</tr>`;
    }).join("");
  }

  function conclude(spent, milliseconds) {
    const { values, greedy, end, seen, ahead } = shown, truth = values.slice(end, end + ahead);
    const error = (forecast) =>
      truth.flatMap((row, h) => row.map((v, i) => Math.abs(v - forecast(h)[i]))).reduce((a, b) => a + b, 0) / (2 * truth.length);
    const ours = error((h) => greedy[h]), last = error(() => values[end - 1]);
    const compared = truth.length ? `mean absolute error of ${truth.length} steps ${ours.toFixed(4)}, of the last value repeated ${last.toFixed(4)}; ` : "";
    const seconds = milliseconds / 1000;
    say(`Done: ${compared}${flops(meter(spent))} FLOPs in ${seconds.toFixed(1)} s in this browser.`);
    const ends = greedy.at(-1).map((v, i) => `${NAMES[i]} ${show(v)}`).join(", ");
    at("chart").setAttribute("aria-label", `Prey and predator against the step. After ${seen} steps up to step ${end}, the forecast reaches ${ends} at step ${end + ahead}.`);
  }

  /* ---------------------------------------------------------------- a series of the reader's own */

  function chooseSeries() {
    const drawing = at("series").value === OWN;
    if (drawing && !own) own = shown.values.map((row) => [...row]); // begin with what was there
    at("draw").hidden = !drawing;
    at("chart").classList.toggle("drawing", drawing);
    if (drawing) at("numbers").value = own.map((row) => row.map(show).join(", ")).join("\n");
    schedule(0);
  }

  function useNumbers() {
    const rows = at("numbers").value.trim().split("\n").map((line) => line.trim().split(/[\s,;]+/).map(Number));
    const bad = rows.findIndex((row) => row.length !== 2 || !row.every((v) => v >= 0 && v * scale < 999));
    if (bad >= 0) return say(`Line ${bad + 1} is not two numbers from 0 to ${Math.floor(999 / scale)}: mend it and try again.`);
    if (rows.length < 7 || rows.length > STEPS) return say(`${rows.length} steps: give 7 to ${STEPS}.`);
    own = rows;
    schedule(0);
  }

  function enableDrawing() {
    let before = null;
    const place = (event) => {
      const box = at("chart").getBoundingClientRect();
      const step = Math.round(shown.step(event.clientX - box.left)), value = shown.value(event.clientY - box.top);
      return [Math.min(own.length, Math.max(1, step)) - 1, Math.min(shown.most, Math.max(0, value))];
    };
    at("chart").addEventListener("pointerdown", (event) => {
      if (at("series").value !== OWN) return;
      turn++; // a forecast that is under way stops
      at("chart").setPointerCapture(event.pointerId);
      before = place(event);
    });
    at("chart").addEventListener("pointermove", (event) => {
      if (!before) return;
      const here = place(event), variable = +document.querySelector("[name=live-pen]:checked").value;
      const [low, high] = before[0] < here[0] ? [before, here] : [here, before];
      for (let i = low[0]; i <= high[0]; i++) {
        own[i][variable] = high[0] === low[0] ? here[1] : low[1] + ((high[1] - low[1]) * (i - low[0])) / (high[0] - low[0]);
      }
      before = here;
      shown = { ...shown, values: own, greedy: [], paths: [] };
      draw();
    });
    for (const name of ["pointerup", "pointercancel"]) {
      at("chart").addEventListener(name, () => {
        if (before) chooseSeries();
        before = null;
      });
    }
  }

  function begin() {
    const options = texts.map((_, i) => `<option value="${i}">test series ${i + 1}</option>`);
    at("series").innerHTML = `${options.join("")}<option value="${OWN}">my own: draw it</option>`;
    at("series").addEventListener("change", chooseSeries);
    for (const id of ["end", "seen", "ahead", "paths"]) {
      at(id).addEventListener("input", () => {
        shown = { ...readControls(), greedy: [], paths: [] };
        draw();
        schedule();
      });
    }
    at("use").addEventListener("click", useNumbers);
    addEventListener("resize", draw);
    enableDrawing();
    shown = { ...readControls(), greedy: [], paths: [] };
    draw();
    setTimeout(() => {
      model = new Qwen2.Model(window.LIVE_MODEL);
      grammar = new Qwen2.Grammar(rules);
      run();
    });
  }

  begin();
})();
