// An upload: by dropping, choosing or pasting a file. `upload` and `trigger` are given by gr.HTML.
const problem = (text) => {
  const line = element.querySelector('.problem');
  line.textContent = text;
  line.hidden = !text;
};
async function take(file) {
  if (!file) return;
  problem('');
  if (file.size > props.megabytes * 1e6) {
    const size = (file.size / 1e6).toFixed(1);
    problem(`${file.name}: ${size} MB is too large; at most ${props.megabytes} MB are taken`);
    return;
  }
  try {
    const { path } = await upload(file);
    props.value = JSON.stringify({ path, name: file.name, at: Date.now() });
    trigger('upload');
  } catch (error) {
    problem(`${file.name}: could not be uploaded (${error.message || error})`);
  }
}
element.addEventListener('change', (event) => {
  if (!event.target.classList.contains('file')) return;
  event.stopPropagation();
  take(event.target.files[0]);
  event.target.value = '';
});
element.addEventListener('dragover', (event) => event.preventDefault());
element.addEventListener('drop', (event) => { event.preventDefault(); take(event.dataTransfer.files[0]); });
