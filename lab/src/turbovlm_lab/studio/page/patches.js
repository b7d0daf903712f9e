// Draws which patches have become one token. `element`, `props` and `watch` are given by gr.HTML.
const view = { data: null, block: 0, patch: null };
const NS = 'http://www.w3.org/2000/svg';
const CELL = 10;
// A patch is a square; a frame of sound stands upright.
const tall = () => (view.data.rows > 1 ? CELL : (view.data.columns * CELL) / 5);
const find = (name) => element.querySelector('.' + name);

function read() {
  const text = props.value;
  view.data = text ? JSON.parse(text) : null;
  const asked = new URLSearchParams(location.search).get('block');
  if (view.data && view.data.blocks) {
    const last = view.data.blocks.length;
    const wanted = asked === null || !/^\d+$/.test(asked) ? last : Number(asked);
    view.block = Math.min(wanted, last);
    if (view.patch !== null && view.patch >= view.data.rows * view.data.columns) view.patch = null;
  }
  if (view.data && view.data.link) window.studio.link(view.data.link);
  draw();
}

function make(name, attributes, parent) {
  const made = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  parent.appendChild(made);
  return made;
}

// The token of every patch behind the block that is shown; before the first block each is its own.
function tokens() {
  const { rows, columns, blocks } = view.data;
  return view.block ? blocks[view.block - 1].source : [...Array(rows * columns).keys()];
}

function borders(inside) {
  const { rows, columns } = view.data;
  let path = '';
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const own = inside(row * columns + column);
      if (column + 1 < columns && own !== inside(row * columns + column + 1)) {
        path += `M${(column + 1) * CELL} ${row * tall()}v${tall()}`;
      }
      if (row + 1 < rows && own !== inside((row + 1) * columns + column)) {
        path += `M${column * CELL} ${(row + 1) * tall()}h${CELL}`;
      }
    }
  }
  return path;
}

function draw() {
  const box = find('patches'), has = view.data && view.data.blocks && view.data.blocks.length;
  box.hidden = !has;
  if (!has) return;
  const { rows, columns, colors, blocks, image } = view.data;
  const svg = find('drawing');
  svg.replaceChildren();
  svg.setAttribute('viewBox', `0 0 ${columns * CELL} ${rows * tall()}`);
  make('image', { href: image, width: columns * CELL, height: rows * tall(), preserveAspectRatio: 'none' }, svg);
  const of = tokens(), groups = new Map();
  of.forEach((token, patch) => groups.set(token, [...(groups.get(token) || []), patch]));
  const cells = make('g', { class: 'cells' }, svg);
  of.forEach((token, patch) => {
    const group = groups.get(token);
    const mean = [0, 1, 2].map((c) => Math.round(group.reduce((sum, each) => sum + colors[each][c], 0) / group.length));
    make('rect', {
      'data-patch': patch, x: (patch % columns) * CELL, y: Math.floor(patch / columns) * tall(), width: CELL,
      height: tall(), fill: group.length > 1 ? `rgb(${mean})` : 'transparent',
    }, cells);
  });
  make('path', { class: 'borders', d: borders((patch) => of[patch]) }, svg);
  make('path', { class: 'shade' }, svg);
  make('path', { class: 'lit' }, svg);
  make('rect', { class: 'cursor', width: CELL, height: tall(), visibility: 'hidden' }, svg);
  const slider = find('block');
  slider.max = blocks.length;
  slider.value = view.block;
  const units = `${rows * columns} ${view.data.unit === 'patch' ? 'patches' : `${view.data.unit}s`}`;
  find('said').textContent = view.block
    ? `after block ${view.block} of ${blocks.length}: ${groups.size} tokens of ${units}`
    : `before the first block: ${units}, one token each`;
  slider.setAttribute('aria-valuetext', find('said').textContent);
  light(view.patch);
}

function number(value) {
  return value === null || value === undefined ? '–' : Number(value.toPrecision(3)).toString().replace('-', '−');
}

function light(patch) {
  const svg = find('drawing');
  if (!svg.querySelector('.lit')) return;
  view.patch = patch;
  const line = find('line');
  const cursor = svg.querySelector('.cursor'), lit = svg.querySelector('.lit'), shade = svg.querySelector('.shade');
  svg.querySelectorAll('.on').forEach((each) => each.classList.remove('on'));
  if (patch === null) {
    lit.setAttribute('d', ''); shade.setAttribute('d', ''); cursor.setAttribute('visibility', 'hidden');
    line.textContent = 'Point at a token, or tab here and use the arrow keys, to see what it is made of.';
    return;
  }
  const { columns, rows, blocks } = view.data, of = tokens(), token = of[patch];
  const at = (each) => [(each % columns) * CELL, Math.floor(each / columns) * tall()];
  let dark = '', edge = '';
  of.forEach((each, place) => {
    const [x, y] = at(place);
    if (each !== token) { dark += `M${x} ${y}h${CELL}v${tall()}h-${CELL}z`; return; }
    svg.querySelector(`[data-patch="${place}"]`).classList.add('on');
    const row = Math.floor(place / columns), column = place % columns;
    if (row === 0 || of[place - columns] !== token) edge += `M${x} ${y}h${CELL}`;
    if (row === rows - 1 || of[place + columns] !== token) edge += `M${x} ${y + tall()}h${CELL}`;
    if (column === 0 || of[place - 1] !== token) edge += `M${x} ${y}v${tall()}`;
    if (column === columns - 1 || of[place + 1] !== token) edge += `M${x + CELL} ${y}v${tall()}`;
  });
  shade.setAttribute('d', dark);
  lit.setAttribute('d', edge);
  const [x, y] = at(patch);
  cursor.setAttribute('x', x); cursor.setAttribute('y', y); cursor.setAttribute('visibility', 'visible');
  const place = rows > 1 ? `row ${Math.floor(patch / columns) + 1}, column ${(patch % columns) + 1}` : `${patch + 1}`;
  if (!view.block) { line.textContent = `${view.data.unit} ${place} · size 1`; return; }
  const block = blocks[view.block - 1], before = block.before[patch], size = block.sizes[token];
  const joined = new Set(block.before.filter((_, place) => of[place] === token)).size;
  const became = joined > 1 ? ` · ${joined} tokens became one in this block` : '';
  line.textContent = `${view.data.unit} ${place} · R ${number(block.r[before])} · A ${number(block.a[before])} · ` +
    `E ${number(block.e[before])} · size ${size}${became}`;
}

element.addEventListener('pointermove', (event) => {
  const cell = event.target.closest && event.target.closest('[data-patch]');
  if (cell && Number(cell.dataset.patch) !== view.patch) light(Number(cell.dataset.patch));
});
element.addEventListener('pointerdown', (event) => {
  const cell = event.target.closest && event.target.closest('[data-patch]');
  if (cell) light(Number(cell.dataset.patch));
});
element.addEventListener('pointerout', (event) => {
  const svg = find('drawing');
  const left = event.target.closest && event.target.closest('.drawing') && !svg.contains(event.relatedTarget);
  if (left && event.pointerType === 'mouse' && document.activeElement !== svg) light(null);
});
element.addEventListener('focusin', (event) => {
  if (event.target.classList.contains('drawing') && view.patch === null) light(0);
});
element.addEventListener('focusout', (event) => {
  if (event.target.classList.contains('drawing')) light(null);
});
element.addEventListener('keydown', (event) => {
  if (!event.target.classList.contains('drawing') || !view.data) return;
  const { rows, columns } = view.data, patch = view.patch || 0;
  const row = Math.floor(patch / columns), column = patch % columns;
  const to = {
    ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1], ArrowUp: [row - 1, column], ArrowDown: [row + 1, column],
  }[event.key];
  if (!to) return;
  event.preventDefault();
  if (to[0] >= 0 && to[0] < rows && to[1] >= 0 && to[1] < columns) light(to[0] * columns + to[1]);
});
element.addEventListener('input', (event) => {
  if (!event.target.classList.contains('block')) return;
  view.block = Number(event.target.value);
  window.studio.link({ block: view.block === view.data.blocks.length ? '' : String(view.block) });
  draw();
});
watch('value', read);
read();
