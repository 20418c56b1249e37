/* A Qwen2 causal language model in plain JavaScript: forward pass with a key-value cache, and the grammar that keeps its text to
   numbers. No library, no network; it runs from a file, in a browser as in Node. What it writes is compared with PyTorch's by the tests.

   Every matrix is stored as PyTorch stores it, (outputs, inputs), in float32; sums are taken in double precision. */
"use strict";

(function (root) {
  /** The numbers of a base64 string of bfloat16 (the upper halves of float32), little-endian. */
  function fromBase64(text) {
    const bytes = atob(text);
    const halves = new Uint32Array(bytes.length / 2);
    for (let i = 0; i < halves.length; i++) {
      halves[i] = ((bytes.charCodeAt(2 * i + 1) << 24) | (bytes.charCodeAt(2 * i) << 16)) >>> 0;
    }
    return new Float32Array(halves.buffer);
  }

  /** x (rows, inputs) · wᵀ + bias → out (rows, outputs); with `add`, added to what `out` holds. Widths are multiples of four. */
  function linear(out, x, w, bias, rows, inputs, outputs, add = false) {
    if (!add) for (let i = 0; i < rows * outputs; i++) out[i] = bias ? bias[i % outputs] : 0;
    let row = 0;
    for (; row + 4 <= rows; row += 4) { // eight sums at a time share what they read
      const x0 = row * inputs, x1 = x0 + inputs, x2 = x1 + inputs, x3 = x2 + inputs;
      for (let o = 0; o < outputs; o += 2) {
        const at = o * inputs, next = at + inputs;
        let s0 = 0, s1 = 0, s2 = 0, s3 = 0, t0 = 0, t1 = 0, t2 = 0, t3 = 0;
        for (let i = 0; i < inputs; i++) {
          const s = w[at + i], t = w[next + i], a = x[x0 + i], b = x[x1 + i], c = x[x2 + i], d = x[x3 + i];
          s0 += s * a, s1 += s * b, s2 += s * c, s3 += s * d;
          t0 += t * a, t1 += t * b, t2 += t * c, t3 += t * d;
        }
        const to = row * outputs + o;
        out[to] += s0, out[to + outputs] += s1, out[to + 2 * outputs] += s2, out[to + 3 * outputs] += s3;
        out[to + 1] += t0, out[to + outputs + 1] += t1, out[to + 2 * outputs + 1] += t2, out[to + 3 * outputs + 1] += t3;
      }
    }
    for (; row < rows; row++) {
      for (let o = 0; o < outputs; o++) {
        const at = o * inputs, from = row * inputs;
        let s0 = 0, s1 = 0, s2 = 0, s3 = 0; // apart, so that no sum waits for the one before it
        for (let i = 0; i < inputs; i += 4) {
          s0 += w[at + i] * x[from + i], s1 += w[at + i + 1] * x[from + i + 1];
          s2 += w[at + i + 2] * x[from + i + 2], s3 += w[at + i + 3] * x[from + i + 3];
        }
        out[row * outputs + o] += s0 + s1 + (s2 + s3);
      }
    }
  }

  /** Each row of x (rows, width) over its root mean square, times the weight. */
  function rmsNorm(out, x, weight, rows, width, epsilon) {
    for (let row = 0; row < rows; row++) {
      const at = row * width;
      let sum = 0;
      for (let i = 0; i < width; i++) sum += x[at + i] * x[at + i];
      const factor = 1 / Math.sqrt(sum / width + epsilon);
      for (let i = 0; i < width; i++) out[at + i] = weight[i] * (x[at + i] * factor);
    }
  }

  class Model {
    /**
     * @param config   Qwen2's config.json
     * @param tensors  [name, length] of every parameter, in the order in which `weights` holds them
     * @param weights  base64 of bfloat16
     */
    constructor({ config, tensors, weights }) {
      const numbers = fromBase64(weights), part = {};
      let at = 0;
      for (const [name, length] of tensors) part[name] = numbers.subarray(at, (at += length));
      this.hidden = config.hidden_size;
      this.inner = config.intermediate_size;
      this.heads = config.num_attention_heads;
      this.groups = config.num_key_value_heads; // key-value heads, each shared by heads / groups query heads
      this.size = config.head_dim || this.hidden / this.heads;
      this.epsilon = config.rms_norm_eps;
      this.longest = config.max_position_embeddings;
      this.vocabulary = config.vocab_size;
      this.embedding = part["model.embed_tokens.weight"]; // (vocabulary, hidden), and the head's weight too
      this.headBias = part["lm_head.bias"];
      this.norm = part["model.norm.weight"];
      this.layers = Array.from({ length: config.num_hidden_layers }, (_, n) => {
        const of = (name) => part[`model.layers.${n}.${name}`];
        return {
          first: of("input_layernorm.weight"), second: of("post_attention_layernorm.weight"),
          q: of("self_attn.q_proj.weight"), k: of("self_attn.k_proj.weight"), v: of("self_attn.v_proj.weight"),
          qBias: of("self_attn.q_proj.bias"), kBias: of("self_attn.k_proj.bias"), vBias: of("self_attn.v_proj.bias"),
          o: of("self_attn.o_proj.weight"),
          gate: of("mlp.gate_proj.weight"), up: of("mlp.up_proj.weight"), down: of("mlp.down_proj.weight"),
          keys: new Float32Array(0), values: new Float32Array(0), // the cache: (tokens, groups, size)
        };
      });
      this.frequencies = Array.from({ length: this.size / 2 }, (_, i) =>
        Math.fround(1 / config.rope_parameters.rope_theta ** ((2 * i) / this.size)),
      );
      this.length = 0; // tokens in the cache; setting it lower forgets those after
    }

    /** Room in the cache for so many tokens. */
    #grow(tokens) {
      if (tokens > this.longest) throw new RangeError(`${tokens} tokens: the model reads ${this.longest} at most`);
      const width = this.groups * this.size;
      for (const layer of this.layers) {
        for (const name of ["keys", "values"]) {
          if (layer[name].length >= tokens * width) continue;
          const larger = new Float32Array(Math.max(tokens, 256, (2 * layer[name].length) / width) * width);
          larger.set(layer[name]);
          layer[name] = larger;
        }
      }
    }

    /** Rotary positions, in place, of x (rows, heads, size) that begins at token `first`; `at` is where in x the rows begin. */
    #rotate(x, at, rows, heads, first) {
      const half = this.size / 2;
      for (let row = 0; row < rows; row++) {
        for (let i = 0; i < half; i++) {
          const angle = Math.fround((first + row) * this.frequencies[i]);
          const cos = Math.cos(angle), sin = Math.sin(angle);
          for (let head = 0; head < heads; head++) {
            const low = at + (row * heads + head) * this.size + i;
            const a = x[low], b = x[low + half];
            x[low] = a * cos - b * sin;
            x[low + half] = b * cos + a * sin;
          }
        }
      }
    }

    /** Every query (rows, heads, size) looks at the cache up to its own token → out, of the same shape. */
    #attend(out, query, { keys, values }, rows) {
      const { size, groups, heads } = this, width = groups * size, share = heads / groups;
      const scores = new Float64Array(this.length + rows), scale = 1 / Math.sqrt(size);
      for (let row = 0; row < rows; row++) {
        const seen = this.length + row + 1;
        for (let head = 0; head < heads; head++) {
          const at = (row * heads + head) * size, group = Math.floor(head / share) * size;
          let largest = -Infinity, sum = 0;
          for (let token = 0, k = group; token < seen; token++, k += width) {
            let s0 = 0, s1 = 0, s2 = 0, s3 = 0;
            for (let i = 0; i < size; i += 4) {
              s0 += query[at + i] * keys[k + i], s1 += query[at + i + 1] * keys[k + i + 1];
              s2 += query[at + i + 2] * keys[k + i + 2], s3 += query[at + i + 3] * keys[k + i + 3];
            }
            const score = (s0 + s1 + s2 + s3) * scale;
            scores[token] = score;
            if (score > largest) largest = score;
          }
          for (let token = 0; token < seen; token++) sum += scores[token] = Math.exp(scores[token] - largest);
          for (let i = 0; i < size; i += 4) {
            let s0 = 0, s1 = 0, s2 = 0, s3 = 0;
            for (let token = 0, v = group + i; token < seen; token++, v += width) {
              const weight = scores[token];
              s0 += weight * values[v], s1 += weight * values[v + 1], s2 += weight * values[v + 2], s3 += weight * values[v + 3];
            }
            out[at + i] = s0 / sum, out[at + i + 1] = s1 / sum, out[at + i + 2] = s2 / sum, out[at + i + 3] = s3 / sum;
          }
        }
      }
    }

    /** Read new tokens after those in the cache: the last hidden states, (tokens, hidden). */
    read(ids) {
      const { hidden, inner, groups, heads, size } = this, rows = ids.length, wide = heads * size, narrow = groups * size;
      this.#grow(this.length + rows);
      const x = new Float32Array(rows * hidden), normed = new Float32Array(rows * hidden);
      const query = new Float32Array(rows * wide), seen = new Float32Array(rows * wide);
      const gate = new Float32Array(rows * inner), up = new Float32Array(rows * inner);
      ids.forEach((id, row) => x.set(this.embedding.subarray(id * hidden, (id + 1) * hidden), row * hidden));
      for (const layer of this.layers) {
        const at = this.length * narrow;
        rmsNorm(normed, x, layer.first, rows, hidden, this.epsilon);
        linear(query, normed, layer.q, layer.qBias, rows, hidden, wide);
        linear(layer.keys.subarray(at), normed, layer.k, layer.kBias, rows, hidden, narrow);
        linear(layer.values.subarray(at), normed, layer.v, layer.vBias, rows, hidden, narrow);
        this.#rotate(query, 0, rows, heads, this.length);
        this.#rotate(layer.keys, at, rows, groups, this.length);
        this.#attend(seen, query, layer, rows);
        linear(x, seen, layer.o, null, rows, wide, hidden, true);
        rmsNorm(normed, x, layer.second, rows, hidden, this.epsilon);
        linear(gate, normed, layer.gate, null, rows, hidden, inner);
        linear(up, normed, layer.up, null, rows, hidden, inner);
        for (let i = 0; i < gate.length; i++) gate[i] = (gate[i] / (1 + Math.exp(-gate[i]))) * up[i];
        linear(x, gate, layer.down, null, rows, inner, hidden, true);
      }
      this.length += rows;
      rmsNorm(normed, x, this.norm, rows, hidden, this.epsilon);
      return normed;
    }

    /** Logits of some tokens (all by default) after one hidden state. */
    score(state, tokens = Array.from({ length: this.vocabulary }, (_, id) => id)) {
      return tokens.map((id) => {
        let s = this.headBias ? this.headBias[id] : 0;
        for (let i = 0, at = id * this.hidden; i < this.hidden; i++) s += state[i] * this.embedding[at + i];
        return s;
      });
    }
  }

  /** Which characters may stand where, as the table that `m2helpers.text.Grammar` builds: next[state][character], or -1. */
  class Grammar {
    constructor({ alphabet, separator, next, tokens }) {
      this.alphabet = alphabet;
      this.separator = separator; // after each step
      this.next = next;
      this.tokens = tokens; // id of each character
      this.forced = next.map((row) => (row.filter((to) => to >= 0).length === 1 ? row.findIndex((to) => to >= 0) : -1));
    }

    /** The state after a text; state 0 is one that anything may have come before. */
    walk(text, state = 0) {
      for (const character of text) {
        state = (this.next[state] || [])[this.alphabet.indexOf(character)] ?? -1;
        if (state < 0) throw new RangeError(`a context breaks the grammar at ${JSON.stringify(character)}`);
      }
      return state;
    }

    encode(text) {
      return Array.from(text, (character) => this.tokens[this.alphabet.indexOf(character)]);
    }
  }

  /** What may come next: the characters of the grammar and their probabilities, 0 where one may not stand. */
  function shares(model, grammar, state, hidden) {
    const logits = model.score(hidden, grammar.tokens).map((s, i) => (grammar.next[state][i] < 0 ? -Infinity : s));
    const largest = Math.max(...logits), weights = logits.map((s) => Math.exp(s - largest));
    const sum = weights.reduce((a, b) => a + b);
    return weights.map((w) => w / sum);
  }

  /** Read a text a few tokens at a time, so that a page stays alive: yields how many are read, ends with the last hidden state. */
  function* readText(model, grammar, text, atOnce = 16) {
    const ids = grammar.encode(text);
    let hidden;
    model.length = 0;
    for (let i = 0; i < ids.length; i += atOnce) {
      const some = ids.slice(i, i + atOnce);
      hidden = model.read(some).slice((some.length - 1) * model.hidden);
      yield i + some.length;
    }
    return hidden;
  }

  /**
   * Write on until `separators` more steps are closed: yields {text, share, likely} as it goes, ends with how many tokens were read.
   * Where one character alone may follow, it joins the one before it and is not asked for. `random` draws; without it, the likeliest.
   */
  function* write(model, grammar, text, hidden, separators, random = null) {
    let state = grammar.walk(text), left = separators, read = 0;
    while (left > 0) {
      const likely = shares(model, grammar, state, hidden);
      let choice = likely.indexOf(Math.max(...likely));
      if (random) {
        let u = random();
        choice = likely.findIndex((share) => share > 0 && (u -= share) < 0);
        if (choice < 0) choice = likely.findLastIndex((share) => share > 0); // rounding left a little over
      }
      const share = likely[choice], added = [];
      while (choice >= 0) {
        added.push(choice);
        state = grammar.next[state][choice];
        if (grammar.alphabet[choice] === grammar.separator) left--;
        choice = left ? grammar.forced[state] : -1;
      }
      yield { text: added.map((i) => grammar.alphabet[i]).join(""), share, likely };
      if (left) {
        hidden = model.read(added.map((i) => grammar.tokens[i])).slice((added.length - 1) * model.hidden);
        read += added.length;
      }
    }
    return read;
  }

  root.Qwen2 = { Model, Grammar, readText, write };
})(typeof module === "undefined" ? window : module.exports);
