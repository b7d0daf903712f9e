// A slider and a field for one number. Its value changes when the slider is let go, a key moves it, or a number is typed.
const field = element.querySelector('.field'), range = element.querySelector('.range');
const show = (value) => { field.value = value; range.value = value; };
element.addEventListener('input', (event) => {
  event.stopPropagation();
  if (event.target === range) field.value = range.value;
});
element.addEventListener('change', (event) => {
  event.stopPropagation();
  const typed = event.target.value === '' ? NaN : Number(event.target.value);
  const value = Number.isFinite(typed) ? Math.min(Math.max(typed, props.low), props.high) : Number(props.value);
  show(value);
  if (value === Number(props.value)) return;
  props.value = value;
  trigger('input');
});
watch('value', () => show(props.value));
show(props.value);
