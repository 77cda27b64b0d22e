// What is shown, as lines of Python that reproduce it.

const HEAD = "import numpy as np\n\nimport fastdiff as fd\n";

/** Numbers as Python writes an array, wrapped. */
export function literal(values) {
  const words = Array.from(values, (value) => (Number.isNaN(value) ? "np.nan" : String(+value.toPrecision(9))));
  let line = "", text = "";
  for (const word of words) {
    if (line.length + word.length > 96) {
      text += `${line}\n    `;
      line = "";
    }
    line += `${word}, `;
  }
  return `[\n    ${(text + line).trimEnd()}\n]`;
}

/** The curves and what is known of their law. */
function setting(page, state) {
  const { model } = page, own = state.own.map((curve) => literal(curve)).join(", ");
  if (!model) {
    const X = state.family ? `X = ${state.family.code}` : `X = np.array([${own}])`;
    const law =
      state.kind === "empirical"
        ? 'law = fd.denoisers.Empirical(X, s, prediction="v")'
        : 'cov = np.cov(X.T, bias=True) + 1e-4 * np.eye(50)\nlaw = fd.denoisers.Gaussian(X.mean(axis=0), cov, s, prediction="v")';
    return `${HEAD}\ns = ${page.code}\n${X}\n${law}\n`;
  }
  const options = [
    model.classes && `labels=np.arange(24) % ${model.classes.length}`,
    model.covariates && `covariates=[${model.covariates.mean.join(", ")}]`,
  ].filter(Boolean);
  let text = `${HEAD}\nmodel = fd.load(${JSON.stringify(model.name)})\ns = model.schedule\n`;
  text += `X = model.sample(24${options.map((option) => `, ${option}`).join("")})\n`;
  const shape = page.shape.length > 1 ? `.reshape(-1, ${page.shape.join(", ")})` : "";
  if (own) text += `X = np.concatenate([X, np.array([${own}])${shape}])\n`;
  return `${text}inner = model.normaliser.apply(X, np.float64)\n`;
}

const table = (page, state) =>
  `table = fd.samplers.${state.sampler}(s, ${state.steps}, prediction="${page.prediction}")\n`;

export function forwardCode(page, state) {
  const X = page.model ? "inner" : "X", copies = state.copies;
  const many = copies > 1 ? `np.tile(${X}, (${copies}${", 1".repeat(page.shape.length)}))` : X;
  const flat = page.shape.length > 1 ? ".reshape(len(many), -1)" : "";
  return `${setting(page, state)}many = ${many}
x_t, z = fd.forward_noise(many, ${state.t}, s, seed=${state.seed})
x_t[${state.selected}]  # the curve
fd.covariance.similarity(x_t[${state.selected}].reshape(-1))
x_t = x_t${flat}
S_t = x_t.T @ x_t / len(x_t)  # measured
X = ${X}.reshape(len(${X}), -1)
fd.covariance.propagate(X.T @ X / len(X), s, ${state.t})  # in closed form
`;
}

function asking(page, state) {
  const { model } = page;
  if (!model || !model.plan.asked) return "";
  const parts = [];
  if (model.classes && state.label !== null) parts.push(`labels=${state.label}`);
  if (model.covariates) parts.push(`covariates=[${state.covariates.join(", ")}]`);
  if (state.guidance !== 1) parts.push(`guidance=${state.guidance}`);
  return parts.map((part) => `, ${part}`).join("");
}

export function backCode(page, state) {
  const head = setting(page, state) + table(page, state), ask = asking(page, state);
  if (state.start === null) {
    return page.model
      ? `${head}model.sample(${state.n}, sampler=table, seed=${state.seed}${ask})\n`
      : `${head}fd.sample(law, table, n=${state.n}, seed=${state.seed})\n`;
  }
  const X = page.model ? "inner" : "X", k = state.selected;
  const tail = `rows = np.array(table.rows)[${state.startRow}:]
tail = fd.Sampler(rows, s, prediction="${page.prediction}")
x_t, z = fd.forward_noise(np.repeat(${X}[${k}:${k + 1}], ${state.n}, axis=0), ${state.start}, s, seed=${state.seed})
`;
  if (!page.model) return `${head}${tail}fd.sample(law, tail, initial=x_t, seed=${state.seed})\n`;
  const of = ask.replace(/covariates=(\[[^\]]*\])/, "covariates=model._inner_covariates($1, 1)[0]");
  return `${head}${tail}x = fd.sample(model.denoiser(), tail, initial=x_t, seed=${state.seed}${of})
factor, offset = model.normaliser.affine()
factor * x + offset
`;
}

export function fillCode(page, state) {
  const head = setting(page, state) + table(page, state), [from, to] = state.erased, k = state.selected;
  const known = `seen = X[${k}].astype(float)\nseen[${from}:${to + 1}] = np.nan\n`;
  if (!page.model) {
    return `${head}${known}posterior = law.given(fd.Known(seen, noise=${state.error}))
fd.sample(posterior, table, n=${state.ways}, seed=${state.seed})
`;
  }
  const options = `sampler=table, method="${state.method}", seed=${state.seed}${asking(page, state)}`;
  return `${head}${known}given = fd.Known(seen, noise=${state.error} * model.normaliser.std)
model.sample(${state.ways}, given=given, ${options})
`;
}
